#!/usr/bin/env bash
# Trains on one host or several under horovodrun. On networks where every machine
# is trusted (see docs/cluster.md); elsewhere use mpirun.sh.
#
#     launch/horovodrun.sh [OPTIONS] -- ARGUMENTS OF hvdnoise train
#
# It starts them once. `hvdnoise launch` calls it again after a failure.
#
#   --hosts LIST         such as node1:2,node2:2: so many ranks on each host at most
#   --hostfile FILE      the same in a file, a line such as "node1 slots=2" for each
#   -np N                ranks (all slots); without hosts: ranks on this machine
#   --gloo, --mpi        what starts the ranks and what they speak (--gloo)
#   --interface NAME     network interface to use, the same on all hosts (found by Horovod)
#   --ssh-port PORT      where sshd listens (what your ssh says, else 22)
#   --ssh-identity FILE  your private key (what your ssh says)
#   --env NAME           hand this variable on, too; repeat it for others
#   --min-np N           leave out hosts that cannot be reached, if so many ranks remain;
#                        hvdnoise train then needs --resume_resize
#   --mark NAME          name of this launch, in its ranks' HVDNOISE_LAUNCH
#   --end NAME           end what is left of a launch on all hosts, and start nothing
#
# Every host is looked at before the launch: it must let ssh in without a password,
# have the same files and versions at the same paths, and the interface. From the
# environment, ranks get PATH, LANG, OMP_NUM_THREADS, HOROVOD_*, HVDNOISE_*, NCCL_*
# and a few more, and what --env names: everyone on a host can read them.
#
# On SIGTERM, SIGINT or SIGHUP the ranks save and end; a second one ends them at
# once. The exit code is that of the first rank that ended with another than 0:
# 75: saved, start again with --resume auto
# 2: bad input; nothing was started
# 1: a host or a rank failed; the last lines say which
set -euo pipefail
set -m # every background job is a process group: it can be ended as a whole

. "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/hosts.sh"

parse "$@"
find_hvdnoise
[[ $controller == gloo ]] || command -v mpirun >/dev/null ||
    fail 2 "--mpi, and no mpirun beside $hvdnoise or on the PATH; run launch/setup.sh, or leave --mpi out"
find_mpi
[[ $controller == gloo || $mpi == openmpi ]] ||
    fail 2 "--mpi, and horovodrun does not know MPICH's mpirun; use launch/mpirun.sh, or leave --mpi out"
keep_listed_variables
set_defaults
set_up_ssh
end_or_go_on
check_hosts

options=("--$controller" --disable-cache -np "$np" -H "$(host_list)"
    ${interface:+--network-interface "$interface"} ${port:+--ssh-port "$port"}
    ${identity:+--ssh-identity-file "$identity"})
[[ $controller == gloo ]] || options+=(--mpi-args="--prefix $(mpi_prefix)")

run "$bin/horovodrun" "${options[@]}" "$hvdnoise" train "${train[@]}"
# Under Gloo, horovodrun makes every exit code 1, and says on stderr which it was.
((status != 1)) || [[ $first_code == - ]] || status=$first_code
say_cause
exit "$status"
