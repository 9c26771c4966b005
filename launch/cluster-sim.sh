#!/usr/bin/env bash
# Simulates a cluster on this machine, for tests and benchmarks: hosts node1,
# node2, ... on one switch, each with its own network, host name, shared memory
# and sshd. Runs COMMAND on node1 and returns its exit code. Needs root.
#
#     launch/cluster-sim.sh --hosts N [--slots N] [--rate RATE] [--timeout SECONDS] -- COMMAND...
#
#   --hosts    how many hosts, 1 to 250
#   --slots    ranks per host in HVDNOISE_SIM_HOSTS (1)
#   --rate     of every link in both directions, such as 100mbit or 1gbit (unlimited)
#   --timeout  ends everything after so many seconds (never)
#
# On every host, HVDNOISE_SIM_HOSTS is "node1:1,node2:1,..." and these work, with
# .venv/bin on the PATH where the caller's has no horovodrun:
#
#     ssh node2 COMMAND...
#     horovodrun --gloo --disable-cache -np 2 -H $HVDNOISE_SIM_HOSTS COMMAND...
#     horovodrun --mpi --disable-cache -np 2 -H $HVDNOISE_SIM_HOSTS COMMAND...
#     mpirun -np 2 -H $HVDNOISE_SIM_HOSTS [-x VARIABLE] COMMAND...
#
# horovodrun takes the caller's variables along, mpirun those of -x. (The cache in
# ~/.horovod would be shared with every other cluster that has a node1.)
#
# The hosts see one set of processes, and this machine's files except for /run and
# /dev/shm. All that is made, keys too, is in namespaces and in memory and goes with
# its processes: nothing is left, however this ends. The exit code is COMMAND's, or
# 2: bad input, or a machine that cannot do it; nothing was started
# 125: a host did not come up
# 137: ended by --timeout or a signal (129 by SIGHUP)
set -euo pipefail

self=$(realpath "${BASH_SOURCE[0]}")
venv=$(dirname "$(dirname "$self")")/.venv
dir=/run/cluster-sim # in the simulation's own /run
network=10.0.0       # the simulation's own, too: any would do

fail() { # EXIT_CODE MESSAGE
    printf 'cluster-sim: %s\n' "$2" >&2
    exit "$1"
}

# ------------------------------------------- before: look at input and machine

main() {
    local hosts='' slots=1 rate='' timeout=0 name
    while (($#)); do
        case $1 in
            --hosts | --slots | --rate | --timeout)
                (($# > 1)) || fail 2 "$1 wants a value; see launch/cluster-sim.sh --help"
                printf -v "${1#--}" %s "$2"
                shift ;;
            -h | --help) sed -n '2,/^set -e/{/^set/d; s/^# \{0,1\}//; p}' "$self"; exit ;;
            --) break ;;
            *) fail 2 "unknown option '$1'; COMMAND goes after --, see launch/cluster-sim.sh --help" ;;
        esac
        shift
    done
    (($# > 1)) || fail 2 "no command; give one after the options: launch/cluster-sim.sh --hosts 2 -- COMMAND"
    shift
    [[ $hosts =~ ^[1-9][0-9]{0,2}$ && $hosts -le 250 ]] || fail 2 "--hosts is '$hosts'; give a number from 1 to 250"
    [[ $slots =~ ^[1-9][0-9]{0,3}$ ]] || fail 2 "--slots is '$slots'; give a number from 1 to 9999"
    [[ $timeout =~ ^[0-9]{1,6}$ ]] || fail 2 "--timeout is '$timeout'; give whole seconds, 0 for no limit"
    [[ $rate =~ ^([1-9][0-9]{0,3}[kmg]bit)?$ ]] || fail 2 "--rate is '$rate'; give one such as 100mbit or 1gbit"

    ((EUID == 0)) || fail 2 "runs as root only, and you are user $EUID; use sudo, or a container of your own"
    for name in ip:iproute2 tc:iproute2 sshd:openssh-server ssh:openssh-client ssh-keygen:openssh-client \
        unshare:util-linux nsenter:util-linux setpriv:util-linux; do
        command -v "${name%:*}" >/dev/null ||
            fail 2 "'${name%:*}' is not on the PATH; install it (Debian, Ubuntu: apt-get install ${name#*:})"
    done
    # Each kind of thing that is made below, in namespaces that end with the trial.
    unshare --pid --fork --mount --mount-proc --net --uts --ipc sh -e -c 'mount -t tmpfs none /run
        mount -t sysfs none /sys
        ip link add switch type bridge
        ip link add eth0 type veth peer name node1
        tc qdisc add dev eth0 root tbf rate 1gbit burst 256kb latency 100ms' >/dev/null 2>&1 ||
        fail 2 "this kernel or container lets root make no namespaces, bridge or rate limit; run on a machine, or in a container with --privileged"

    # The kernel ends what is in a process namespace with its first process. That one
    # dies with unshare, and unshare with timeout, be it by SIGKILL. timeout passes
    # other signals on, and kills right after, since unshare blocks some of them.
    exec timeout --foreground --signal=KILL --kill-after=0.1 --verbose "$timeout" \
        setpriv --pdeathsig KILL \
        unshare --pid --fork --kill-child --mount --mount-proc --net --uts --ipc \
        "$self" =switch "$hosts" "$slots" "$rate" "$@"
}

# -------------------------- inside: the switch, the first process of all the rest

switch() { # HOSTS SLOTS RATE COMMAND...
    local i
    mount -t tmpfs -o mode=755 tmpfs /run
    mkdir -m 700 "$dir" "$dir/bin" /run/sshd
    name_hosts "$1" "$2"
    unlock_root
    set_environment
    set_up_ssh
    ip link add switch type bridge
    ip link set switch up
    for ((i = $1; i > 1; i--)); do new_host "$i" "$3" || exit; done
    new_host 1 "$3" "${@:4}" || exit # the last: COMMAND finds the others up
}

name_hosts() { # HOSTS SLOTS
    local i
    HVDNOISE_SIM_HOSTS=''
    echo '127.0.0.1 localhost' >"$dir/hosts"
    for ((i = 1; i <= $1; i++)); do
        echo "$network.$i node$i" >>"$dir/hosts"
        HVDNOISE_SIM_HOSTS=${HVDNOISE_SIM_HOSTS:+$HVDNOISE_SIM_HOSTS,}node$i:$2
    done
    mount --bind "$dir/hosts" /etc/hosts
}

unlock_root() { # a locked account, as Ubuntu's root, gets in by no key
    sed 's/^root:[^:]*/root:*/' /etc/shadow | install -m 600 /dev/stdin "$dir/shadow"
    mount --bind "$dir/shadow" /etc/shadow
}

set_environment() { # what COMMAND and the ssh sessions get
    command -v horovodrun >/dev/null || PATH=$venv/bin:$PATH
    environment=(
        PATH="$dir/bin:$PATH"
        HVDNOISE_SIM_HOSTS="$HVDNOISE_SIM_HOSTS"
        HOROVOD_GLOO_IFACE=eth0
        NCCL_SOCKET_IFNAME=eth0
        OMPI_MCA_btl_tcp_if_include=eth0
        OMPI_MCA_oob_tcp_if_include=eth0
        OMPI_MCA_orte_tmpdir_base="$dir"
        OMPI_ALLOW_RUN_AS_ROOT=1
        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    )
    export "${environment[@]}"
}

set_up_ssh() {
    ssh-keygen -q -t ed25519 -N '' -f "$dir/host_key"
    ssh-keygen -q -t ed25519 -N '' -f "$dir/id"
    echo "node* $(<"$dir/host_key.pub")" >"$dir/known_hosts"
    cat >"$dir/sshd_config" <<END
HostKey $dir/host_key
AuthorizedKeysFile $dir/id.pub
AuthenticationMethods publickey
UsePAM no
MaxStartups 1000
# SHLVL: or bash takes PATH from the ~/.bashrc of this machine.
SetEnv SHLVL=1$(printf ' "%s"' "${environment[@]}")
END
    cat >"$dir/ssh_config" <<END
IdentityFile $dir/id
IdentitiesOnly yes
UserKnownHostsFile $dir/known_hosts
BatchMode yes
LogLevel ERROR
ServerAliveInterval 2
END
    # Before the arguments: Horovod asks for no check of host keys, and the first word counts.
    cat >"$dir/bin/ssh" <<END
#!/bin/sh
exec $(command -v ssh) -F $dir/ssh_config -o StrictHostKeyChecking=yes "\$@"
END
    chmod 700 "$dir/bin/ssh"
}

new_host() { unshare --mount --net --uts --ipc "$self" =host "$@"; }

# ------------------------------------------------------ on each host, by itself

host() { # NUMBER RATE [COMMAND...]
    local name=node$1 address=$network.$1 log=$dir/node$1.log pid=$dir/node$1.pid sshd
    sshd=$(command -v sshd) # which wants to be started by its path
    echo "$name" >/proc/sys/kernel/hostname
    mount -t tmpfs tmpfs /dev/shm
    mount -t sysfs sysfs /sys # /sys/class/net is that of the mount
    # The one that every Linux has and lets a namespace choose: the same on every machine.
    echo reno >/proc/sys/net/ipv4/tcp_congestion_control
    ip link set lo up
    ip link add eth0 type veth peer name "$name" netns 1
    ip address add "$address/24" dev eth0
    ip link set eth0 up
    at_switch ip link set "$name" master switch up
    if [[ $2 ]]; then # a queue limits what leaves by it: one at either end
        tc qdisc add dev eth0 root tbf rate "$2" burst 256kb latency 100ms
        at_switch tc qdisc add dev "$name" root tbf rate "$2" burst 256kb latency 100ms
    fi
    # It listens by the time it has written its process id.
    if ! "$sshd" -f "$dir/sshd_config" -E "$log" -o ListenAddress="$address" -o PidFile="$pid" ||
        ! timeout 30 bash -c "until [[ -s $pid ]]; do sleep 0.01; done"; then
        fail 125 "no sshd on $name: $(tail -n 1 "$log")"
    fi
    (($# == 2)) || exec "${@:3}"
}

at_switch() { nsenter --target 1 --net "$@"; }

case ${1-} in
    =switch | =host)
        set -E
        trap 'fail 125 "the hosts did not come up"' ERR
        "${1#=}" "${@:2}"
        ;;
    *) main "$@" ;;
esac
