#!/usr/bin/env bash
# Trains on one host or several under the mpirun of Open MPI or MPICH. In a Slurm allocation and
# in a Kubeflow MPIJob it finds its hosts by itself.
#
#     launch/mpirun.sh [OPTIONS] -- ARGUMENTS OF hvdnoise train
#
# It starts them once. `hvdnoise launch` calls it again after a failure.
#
#   --hosts LIST         such as node1:2,node2:2: so many ranks on each host at most
#   --hostfile FILE      the same in a file, a line such as "node1 slots=2" for each
#   -np N                ranks (all slots); without hosts: ranks on this machine
#   --interface NAME     network interface to use, the same on all hosts, or a network
#                        such as 10.0.0.0/24 where names differ (all that there are); MPICH
#                        takes a name only
#   --ssh-port PORT      where sshd listens (what your ssh says, else 22)
#   --ssh-identity FILE  your private key (what your ssh says)
#   --env NAME           hand this variable on, too; repeat it for others
#   --min-np N           leave out hosts that cannot be reached, if so many ranks remain;
#                        hvdnoise train then needs --resume_resize
#   --mark NAME          name of this launch, in its ranks' HVDNOISE_LAUNCH
#   --end NAME           end what is left of a launch on all hosts, and start nothing
#
# Every host is looked at before the launch, but in a Slurm allocation: it must let
# ssh in without a password, have the same files and versions at the same paths, and
# the interface. From the environment, ranks get PATH, LANG, OMP_NUM_THREADS,
# HOROVOD_*, HVDNOISE_*, NCCL_* and a few more, and what --env names. Ranks are bound
# to no cores; OMPI_MCA_* (Open MPI) and HYDRA_* or MPIR_CVAR_* variables (MPICH) change
# what else mpirun does.
#
# On SIGTERM, SIGINT or SIGHUP the ranks save and end; a second one ends them at
# once. The exit code is that of the ranks:
# 75: saved, start again with --resume auto
# 2: bad input; nothing was started
# 1: a host or a rank failed; the last lines say which
set -euo pipefail
set -m # every background job is a process group: it can be ended as a whole

. "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/hosts.sh"

parse "$@"
find_hvdnoise
command -v mpirun >/dev/null || fail 2 "no mpirun beside $hvdnoise or on the PATH; run launch/setup.sh, or use launch/horovodrun.sh"
find_mpi
if [[ $mpi == openmpi ]] && ((EUID == 0)) && [[ ${OMPI_ALLOW_RUN_AS_ROOT-} != 1 || ${OMPI_ALLOW_RUN_AS_ROOT_CONFIRM-} != 1 ]]; then
    fail 2 "mpirun runs as root only where that is meant; be another user, or set OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
fi
keep_listed_variables
set_defaults
set_up_ssh
end_or_go_on

((${#hosts[@]} == 0)) || check_hosts
names=(HVDNOISE_LAUNCH)
for name in $(compgen -e); do
    if travels "$name"; then names+=("$name"); fi
done
if [[ $mpi == openmpi ]]; then
    options=(--map-by slot --prefix "$(mpi_prefix)" ${np:+-np "$np"} ${hosts:+-H "$(host_list)"})
    for name in "${names[@]}"; do options+=(-x "$name"); done
else
    options=(-bind-to none -genvlist "$(IFS=,; echo "${names[*]}")" ${np:+-np "$np"}
        ${interface:+-iface "$interface"} ${hosts:+-hosts "$(host_list)"})
    [[ ${SLURM_JOB_ID-} ]] || ! command -v ssh >/dev/null ||
        options+=(-launcher ssh -launcher-exec "$launch/bin/ssh")
fi
run mpirun "${options[@]}" "$hvdnoise" train "${train[@]}"
say_cause
exit "$status"
