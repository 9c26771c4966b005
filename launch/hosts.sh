# What horovodrun.sh and mpirun.sh have in common; they source it. It reads their
# options, looks at every host before a launch, and sees the launch to its end.
# Nothing here needs more than bash, ssh and what every Linux has.

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
program=${0##*/}
hosts=() slots=() passed=() train=()
np='' least='' interface='' port='' identity='' controller=gloo
mark='' end=''
hvdnoise='' mpi='' launcher='' stopping='' lost='' signalled=''
outlives='' lost_host='' first_rank=- first_code=- first_how='' cause=''
look_seconds=50 # for what is done on one host before a launch; all hosts at once
save_seconds=60 # that ranks get to save after a SIGTERM
end_seconds=15  # that a launcher gets to end what is left
orphan_seconds=10 # that ranks get to save where the script itself was killed
lost_seconds=20 # after a connection to a host broke, until the launcher is killed
patience=50     # tenths of a second that ranks get to end by themselves after a failure

say() { printf '%s: %s\n' "$program" "$*" >&2; }

fail() { # EXIT_CODE MESSAGE
    say "error: $2"
    exit "$1"
}

# ------------------------------------------------------------------ the options

parse() { # ARGUMENTS of the script
    local list='' file=''
    while (($#)); do
        case $1 in
            --hosts | --hostfile | -np | --min-np | --interface | --ssh-port | --ssh-identity | --env | --mark | --end)
                (($# > 1)) && [[ $2 && $2 != -- ]] || fail 2 "$1 wants a value; see launch/$program --help"
                case $1 in
                    --hosts) list=$2 ;;
                    --hostfile) file=$2 ;;
                    -np) np=$2 ;;
                    --min-np) least=$2 ;;
                    --interface) interface=$2 ;;
                    --ssh-port) port=$2 ;;
                    --ssh-identity) identity=$2 ;;
                    --env) passed+=("$2") ;;
                    --mark) mark=$2 ;;
                    --end) end=$2 ;;
                esac
                shift ;;
            --gloo | --mpi)
                [[ $program != mpirun.sh ]] || fail 2 "$1 is an option of launch/horovodrun.sh; leave it out"
                controller=${1#--} ;;
            -h | --help) sed -n '2,/^set -e/{/^set/d; s/^# \{0,1\}//; p}' "$0"; exit ;;
            --) break ;;
            *) fail 2 "unknown option '$1'; what goes to hvdnoise train comes after --, see launch/$program --help" ;;
        esac
        shift
    done
    (($#)) || fail 2 "no --; what comes after it goes to hvdnoise train: launch/$program [OPTIONS] -- --config FILE"
    train=("${@:2}")
    check_options
    name_hosts "$list" "$file"
}

check_options() {
    local name
    [[ $np =~ ^([1-9][0-9]{0,4})?$ ]] || fail 2 "-np is '$np'; give a number of ranks, 1 or more"
    [[ $least =~ ^([1-9][0-9]{0,4})?$ ]] || fail 2 "--min-np is '$least'; give a number of ranks, 1 or more"
    for name in "$mark" "$end"; do
        [[ $name =~ ^[A-Za-z0-9._-]*$ ]] || fail 2 "'$name' is no name of a launch; give letters, digits, dots and dashes"
    done
    [[ $port =~ ^([1-9][0-9]{0,4})?$ ]] || fail 2 "--ssh-port is '$port'; give a number from 1 to 65535"
    [[ ! $identity || ( -f $identity && -r $identity && $identity != *[[:space:]]* ) ]] ||
        fail 2 "--ssh-identity is '$identity', which cannot be read; give the file of your private key, its path without spaces"
    case $interface in
        */*) [[ $program == mpirun.sh && $interface =~ ^[0-9.]+/[0-9]+$ ]] ||
            fail 2 "--interface is '$interface'; give a name such as eth0 (mpirun.sh also takes a network such as 10.0.0.0/24)" ;;
        *) [[ $interface =~ ^[A-Za-z0-9._-]{0,15}$ ]] || fail 2 "--interface is '$interface'; give one name such as eth0" ;;
    esac
    for name in "${passed[@]}"; do
        [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ && ${!name+set} ]] ||
            fail 2 "--env is '$name', and no such variable is set; give the name of one, without its value"
    done
}

name_hosts() { # LIST HOSTFILE, of which one may be given, or none
    local each list total=0
    [[ ! $1 || ! $2 ]] || fail 2 "both --hosts and --hostfile; give one of them"
    if [[ $1 ]]; then
        IFS=, read -r -a list <<<"$1"
        for each in "${list[@]}"; do add_host "$each" "--hosts is '$1'; write it as node1:2,node2:2"; done
    elif [[ $2 || ${OMPI_MCA_orte_default_hostfile-} ]]; then # the second as in an MPIJob
        read_hostfile "${2:-$OMPI_MCA_orte_default_hostfile}"
        unset OMPI_MCA_orte_default_hostfile
    elif [[ $program == mpirun.sh && ${SLURM_JOB_ID-} ]]; then # mpirun asks Slurm
        [[ ! $least ]] || fail 2 "--min-np is '$least', and Slurm says which hosts there are; leave it out"
        return
    else
        [[ $np ]] || fail 2 "neither hosts nor a number of ranks; give --hosts or --hostfile, or -np for ranks on this machine"
        add_host "localhost:$np" ''
    fi
    for each in "${slots[@]}"; do ((total += each)); done
    np=${np:-$total}
    ((np <= total)) || fail 2 "too few slots: -np is $np, and $(host_list) have $total; add hosts or slots, or lower -np"
    [[ ! $least ]] || ((least <= np)) || fail 2 "--min-np is $least, and there are $np ranks at most; lower it, or add hosts or slots"
    ((${#hosts[@]} == 1)) || [[ " ${hosts[*]} " != *' localhost '* ]] ||
        fail 2 "localhost is one of several hosts; give the name by which the others know this machine"
}

read_hostfile() { # FILE
    local line number=0
    [[ -r $1 && ! -d $1 ]] || fail 2 "the hostfile '$1' cannot be read; give a file with a line such as 'node1 slots=2' for each host"
    while read -r line || [[ $line ]]; do
        ((++number))
        line=${line%%#*}
        line=${line%"${line##*[![:space:]]}"}
        [[ ! $line ]] || add_host "$line" "line $number of the hostfile '$1' is '$line'; write it as: node1 slots=2"
    done <"$1"
    ((${#hosts[@]})) || fail 2 "the hostfile '$1' names no host; give it a line such as 'node1 slots=2' for each"
}

add_host() { # NAME[:SLOTS] or NAME [slots=SLOTS], MESSAGE if it is neither
    [[ $1 =~ ^([A-Za-z0-9][A-Za-z0-9._-]*)((:|[[:space:]]+slots[[:space:]]*=[[:space:]]*)([1-9][0-9]{0,3})([[:space:]]+max[-_]slots=[0-9]+)?)?$ ]] ||
        fail 2 "$2"
    local name=${BASH_REMATCH[1]} count=${BASH_REMATCH[4]:-1}
    [[ " ${hosts[*]} " != *" $name "* ]] || fail 2 "host $name is given twice; give it once, with the sum of its slots"
    hosts+=("$name") slots+=("$count")
}

host_list() { # node1:2,node2:2
    local i list=''
    for i in "${!hosts[@]}"; do list+=,${hosts[i]}:${slots[i]}; done
    echo "${list#,}"
}

host_of() { # RANK
    local i rank=$1
    for i in "${!hosts[@]}"; do
        ((rank >= slots[i])) || { echo "${hosts[i]}"; return; }
        ((rank -= slots[i]))
    done
}

# --------------------------------------------- the program and its environment

find_hvdnoise() {
    hvdnoise=$(command -v hvdnoise || echo "$launch/../.venv/bin/hvdnoise")
    [[ -x $hvdnoise ]] || fail 2 "hvdnoise is not on the PATH and there is no .venv; run launch/setup.sh, or activate its environment"
    hvdnoise=$(realpath "$hvdnoise")
    bin=$(dirname "$hvdnoise")
    PATH=$bin:$PATH
}

find_mpi() { # sets mpi to whose mpirun is the first on the PATH: openmpi or mpich
    mpi=openmpi
    [[ $(timeout 20 mpirun --version 2>&1) != *HYDRA* ]] || mpi=mpich
    [[ $mpi == openmpi || $interface != */* ]] ||
        fail 2 "--interface is '$interface'; MPICH's mpirun takes a name such as eth0"
}

# What other processes see is a short list: Horovod's Gloo launch writes every
# variable on the command line of every rank, where all users of a host read it.
keep_listed_variables() {
    local name
    for name in $(compgen -e); do listed "$name" || export -n "${name?}"; done
}

listed() { # NAME: whether a launcher may have this variable
    case $1 in
        HOME | USER | LOGNAME | TERM | TMPDIR | SSH_AUTH_SOCK | CUDA_VISIBLE_DEVICES) ;;
        HYDRA_*) ;;
        SLURM_* | PMI_* | PMIX_* | OMPI_* | OPAL_*) [[ $program == mpirun.sh || $1 == O* ]] ;;
        *) travels "$1" ;;
    esac
}

travels() { # NAME: whether ranks on other hosts need it, too
    case $1 in
        PATH | LD_LIBRARY_PATH | PYTHONPATH | PYTHONUNBUFFERED | LANG | LC_ALL | TZ | OMP_NUM_THREADS) ;;
        CUBLAS_WORKSPACE_CONFIG | HOROVOD_* | HVDNOISE_* | NCCL_* | UCX_* | FI_* | MPIR_CVAR_*) ;;
        *) [[ " ${passed[*]} " == *" $1 "* ]] ;;
    esac
}

set_defaults() { # of Open MPI; what the environment says goes before
    local setting last=3
    # mpirun waits so long several times over to end the rest after a rank has failed. It
    # is also what ranks get to save where Slurm signals mpirun's daemons.
    [[ ! ${SLURM_JOB_ID-} ]] || last=10
    for setting in hwloc_base_binding_policy=none mpi_yield_when_idle=1 odls_base_sigkill_timeout=$last \
        oob_tcp_keepalive_time=10 oob_tcp_keepalive_intvl=5 oob_tcp_keepalive_probes=3; do
        setting=OMPI_MCA_$setting
        export "${setting%%=*}=$(printenv "${setting%%=*}" || echo "${setting#*=}")"
    done
    export PYTHONUNBUFFERED=1
    [[ $interface ]] || return 0
    export OMPI_MCA_btl_tcp_if_include=$interface OMPI_MCA_oob_tcp_if_include=$interface
    [[ $interface == */* ]] || export HOROVOD_GLOO_IFACE=$interface NCCL_SOCKET_IFNAME=$interface
    [[ $mpi != mpich ]] || export FI_TCP_IFACE=$interface UCX_NET_DEVICES=$interface
}

mpi_prefix() { dirname "$(dirname "$(realpath "$(command -v mpirun)")")"; } # where other hosts find orted

set_up_ssh() {
    # Before all others: launch/bin/ssh, which asks nothing and keeps the check of host keys.
    command -v ssh >/dev/null && PATH=$launch/bin:$PATH
    ssh_arguments=(${OMPI_MCA_plm_rsh_args-} ${port:+-p "$port"} ${identity:+-i "$identity"})
    ((${#ssh_arguments[@]} == 0)) || export OMPI_MCA_plm_rsh_args="${ssh_arguments[*]}"
    [[ $mpi != mpich ]] || export launch_ssh_arguments="${ssh_arguments[*]}" # for launch/bin/ssh
}

# ----------------------------------------------------------- on all hosts at once

# Runs a script of sh within so many seconds on this machine, as "localhost", and on
# every host that is another. Prints a line for each in the order in which they are
# done: HOST STATUS OUTPUT, the lines of OUTPUT parted by tabs. STATUS is the
# script's, or 255 where ssh could not reach the host.
everywhere() { # SECONDS SCRIPT
    local host
    for host in localhost "${hosts[@]}"; do
        on_host "$1" "$2" "$host" &
    done
    wait
}

on_host() { # SECONDS SCRIPT HOST
    local said status=0
    # --foreground: it stays in this job, and ends with it.
    if [[ $3 == localhost ]]; then
        said=$(timeout --foreground --kill-after=5 "$1" sh -s <<<"$2" 2>&1) || status=$?
    elif is_here "$3"; then
        return
    elif ! command -v ssh >/dev/null; then
        status=255 said='no ssh'
    else
        said=$(timeout --foreground --kill-after=5 "$1" ssh "${ssh_arguments[@]}" -o LogLevel=ERROR "$3" \
            'exec sh -s' <<<"$2" 2>&1) || status=$?
    fi
    said=${said//$'\r'/}
    ((${#said} < 2000)) || said=${said: -2000} # so that a line is written in one piece
    printf '%s\n' "$3 $status ${said//$'\n'/$'\t'}"
}

is_here() { # HOST: whether that is this machine
    local address
    address=$(timeout 10 getent ahostsv4 "$1" | awk 'NR == 1 { print $1 }') || return
    [[ $address == 127.* || ($address && " $(hostname -I) " == *" $address "*) ]]
}

# ------------------------------------------------------------ before the launch

# Prints "versions NAME=VALUE ..." where ranks can run, else "wrong" and why not.
look='
wrong() { echo "wrong $*"; exit; }
cd "$folder" 2>/dev/null || wrong "has no folder $folder; share it among the hosts, or have the same files at the same path"
[ -z "$interface" ] || [ -e "/sys/class/net/$interface" ] ||
    wrong "has no interface $interface, only $(ls /sys/class/net | xargs); name one that all hosts have: --interface"
[ -x "$hvdnoise" ] || wrong "has no $hvdnoise; install the same hvdnoise there, at the same path (launch/setup.sh), or use the same image"
said=$(timeout --foreground "$seconds" "$hvdnoise" doctor --versions 2>&1) || case $? in
    124) wrong "has not started $hvdnoise within $seconds s; see what else it does, or what its file system does" ;;
    *) wrong "cannot start $hvdnoise ($(echo "$said" | tail -n 1)); run launch/setup.sh there, from the same files" ;;
esac
echo "$said" | grep "^versions "'

check_hosts() {
    local host status said known='' wrong='' script gone=()
    script="seconds=$((look_seconds - 5)) folder=${PWD@Q} hvdnoise=${hvdnoise@Q} interface=$([[ $interface == */* ]] || echo "${interface@Q}")
${PYTHONPATH:+export PYTHONPATH=${PYTHONPATH@Q}}
$look"
    local -A answers=()
    coproc looking { everywhere "$look_seconds" "$script"; } </dev/null
    trap 'kill -- "-$looking_PID"; exit 143' TERM INT HUP
    while read -r host status said; do answers[$host]="$status $said"; done <&"${looking[0]}"
    wait "${looking_PID-}" 2>/dev/null || true # or bash says of the next one that this is still there
    trap - TERM INT HUP
    known=${answers[localhost]##*$'\t'}
    [[ $controller == gloo && $program != mpirun.sh || $known != *' mpi-of-'* ]] ||
        fail 1 "this machine has a mixture of MPIs ($(grep -oE 'mpi-of-[^ ]*' <<<"$known" | sed 's/mpi-of-//; s/=/ has /' | paste -sd ',')); put the mpirun of Horovod's MPI first on the PATH, or run launch/setup.sh --mpi system"
    for host in localhost "${hosts[@]}"; do
        [[ ${answers[$host]-} ]] || continue # this machine, by its name
        said=$(what_is_wrong "$host" "${answers[$host]%% *}" "${answers[$host]#* }" "${known#* }")
        [[ $said ]] || continue
        [[ ! $least || $host == localhost || ${answers[$host]%% *} != @(124|137|255) ]] || { gone+=("$host"); continue; }
        say "error: $said"
        wrong=1
        [[ $host != localhost ]] || break # what is wrong here may be the cause of the rest
    done
    [[ ! $wrong ]] || exit 1
    ((${#gone[@]} == 0)) || leave_out "${gone[@]}"
}

leave_out() { # HOSTS that cannot be reached
    local i rest=() counts=() left=0
    for i in "${!hosts[@]}"; do
        [[ " $* " != *" ${hosts[i]} "* ]] || continue
        rest+=("${hosts[i]}") counts+=("${slots[i]}")
        ((left += slots[i])) || true
    done
    ((left >= least)) || fail 1 "$* cannot be reached, and $left ranks are left of the $least that --min-np wants; look after it"
    hosts=("${rest[@]}") slots=("${counts[@]}")
    ((np <= left)) || np=$left
    say "warning: $* cannot be reached and is left out; ranks: $np"
}

what_is_wrong() { # HOST STATUS OUTPUT VERSIONS_HERE: prints it, with the cure
    local host=$1 status=$2 last=${3##*$'\t'} at=" port ${port:-22}"
    [[ $host != localhost ]] || host="this machine"
    if ((status == 0)) && [[ $last == wrong\ * ]]; then
        echo "$host ${last#wrong }"
    elif ((status == 0)) && [[ $last == versions\ * ]]; then
        differences "$host" "$last" "$4"
    elif ((status == 124 || status == 137)); then
        echo "$host let ssh in but was not done with its checks in $look_seconds s; is its file system slow or gone? try: ssh $host $hvdnoise doctor --versions"
    elif ((status != 255)); then
        echo "$host cannot run the checks ($last, exit code $status); try: ssh $host $hvdnoise doctor --versions"
    else
        case $3 in
            'no ssh') echo "$host is another machine, and there is no ssh here; install it (Debian, Ubuntu: apt-get install openssh-client)" ;;
            *'Could not resolve'*) echo "$host is no known host name; correct it, or add it to the DNS or to /etc/hosts" ;;
            *'Connection refused'*) echo "$host refuses connections to$at; start sshd there, or name its port: --ssh-port" ;;
            *'HAS CHANGED'*) echo "$host shows another host key than the one you know; if it was installed anew: ssh-keygen -R $host, and log in once by hand; if not, do not trust it" ;;
            *'Host key verification failed'* | *'host key is known'*) echo "$host has a host key that you do not know yet; log in once by hand, and compare it: ssh $host" ;;
            *'Permission denied'* | *'Too many authentication failures'*) echo "$host takes no key of yours; add it there with ssh-copy-id $host, or name another one: --ssh-identity" ;;
            *'No route'* | *'timed out'* | *'unreachable'* | *'Connection closed'* | *'Connection reset'*)
                echo "$host does not answer on$at; is it up, and does a firewall let this machine in?" ;;
            *) echo "$host cannot be reached by ssh ($last); try: ssh $host true" ;;
        esac
    fi
}

differences() { # HOST "versions a=1 b=2" "versions a=1 b=3", of this machine
    local each found=''
    for each in $2; do
        [[ " $3 " == *" $each "* ]] || found+=", ${each/=/ } (here $(tr ' ' '\n' <<<"$3" | sed -n "s/^${each%%=*}=//p"))"
    done
    [[ ! $found ]] || echo "$1 has other versions: ${found#, }; run launch/setup.sh from the same files on all hosts, or use the same image"
}

# ------------------------------------------------------------------ the launch

# Runs a launcher to its end, and sets status to its exit code. On SIGTERM the
# ranks save; a second one ends them at once.
run() { # COMMAND...
    local each
    mark=${mark:-$(hostname)-$$-$(date +%s)}
    marked="^HVDNOISE_LAUNCH=$mark\$"
    trap stop TERM INT HUP
    trap lose USR1 # from launch/bin/ssh
    coproc heard { listen; }
    exec {errors}>&"${heard[1]}" {heard[1]}>&- {ended}<&"${heard[0]}" # bash forgets heard at its end
    launch_script=$$ HVDNOISE_LAUNCH=$mark "$@" </dev/null 2>&"$errors" &
    launcher=$!
    exec {errors}>&-
    outlive </dev/null &
    outlives=$!
    disown "$outlives"
    while # a signal ends the wait, not the launcher
        signalled='' status=0
        wait "$launcher" || status=$?
        ((status > 128)) && { [[ $signalled ]] || kill -0 "$launcher" 2>/dev/null; }
    do
        [[ $signalled ]] || sleep 1 # it was stopped, as by Ctrl-Z
    done
    trap '' TERM INT HUP USR1
    for each in $stopping $lost $outlives; do kill -- "-$each" 2>/dev/null || true; done
    kill -KILL -- "-$launcher" 2>/dev/null || true # what it may have left in its group
    [[ ! $lost ]] || ((status < 128)) || status=1 # it was killed, as the host was lost
    IFS=$'\t' read -r -t 5 first_rank first_code first_how cause <&"$ended" || true
    ((status == 0 || status == 2 || status == 75)) || sweep
}

# Copies what a launcher says on stderr, but for the traceback by which horovodrun
# ends. At its end prints which rank ended first, its exit code, that in words, and
# the cause in the words of that rank, or of one that noticed.
listen() {
    local line held='' rank='' code='' how='' own='' other=''
    while IFS= read -r line || [[ $line ]]; do
        if [[ $line == Traceback* || ($held && $line == ' '*) ]]; then
            held+=$line$'\n'
            continue
        fi
        [[ $line == 'RuntimeError: Horovod detected'* ]] || printf %s "$held" >&2 # that of horovodrun
        held=''
        printf '%s\n' "$line" >&2
        if [[ $line =~ hvdnoise:\ (error:.*|rank\ [0-9]+\ (failed|stood|was).*) ]]; then
            own=${own:-${BASH_REMATCH[1]}}
        elif [[ $line =~ hvdnoise:\ (rank\ [0-9]+\ (ends|waited).*) ]]; then
            other=${other:-${BASH_REMATCH[1]}}
        elif [[ $line =~ process\ rank\ ([0-9]+)\ with\ PID(.*\ (on\ signal\ .*))? ]]; then
            rank=${rank:-${BASH_REMATCH[1]}} how=${how:-${BASH_REMATCH[3]}}
        elif [[ $line == *' exiting improperly.'* ]]; then # with any code, also 0
            how=${how:-by an exit in mid-run}
        elif [[ $line =~ ^\ *Process\ name:\ (\[\[.*,)?([0-9]+)\]?$ ]]; then
            rank=${rank:-${BASH_REMATCH[2]}}
        elif [[ $line =~ ^(\ *Exit\ code:|=\ +EXIT\ CODE:)\ *([0-9]+)$ ]]; then
            code=${code:-${BASH_REMATCH[2]}} how=${how:-with exit code ${BASH_REMATCH[2]}}
        fi
    done
    printf %s "$held" >&2
    printf '%s\t%s\t%s\t%s\n' "${rank:--}" "${code:--}" "${how:--}" "${own:-${other:--}}"
}

say_cause() { # the last line of a launch that failed, after all that its launcher says
    local on
    ((status != 0 && status != 2 && status != 75)) && [[ ! $lost_host && $cause ]] || return 0
    if [[ $cause =~ ^(error:|rank\ [0-9]+\ (failed|stood|was)) ]]; then
        say "$cause"
    elif [[ $first_rank != - ]]; then
        on=$(host_of "$first_rank")
        say "rank $first_rank${on:+ on $on} ended first, ${first_how/#-/badly}$([[ $cause == - ]] || echo ": $cause")"
    elif [[ $cause != - ]]; then
        say "$cause"
    fi
}

# Where this script is killed, it cannot end its launcher any more: this process does.
outlive() {
    local state
    while read -r state <"/proc/$$/stat" && [[ ${state##*) } != [ZX]* ]]; do sleep 1; done 2>/dev/null
    ask_ranks
    sleep "$orphan_seconds"
    end_launcher
}

stop() {
    if [[ $stopping ]]; then
        ((SECONDS - stopped_at > 1)) || return 0 # the same wish, delivered twice
        say "second signal: ending at once"
        kill -- "-$stopping" 2>/dev/null || true
        end_launcher &
    else
        say "asked to stop: the ranks save and end; a second signal ends them at once"
        stopped_at=$SECONDS
        { ask_ranks; sleep "$save_seconds"; end_launcher; } &
    fi
    stopping=$! signalled=1
    disown "$stopping" # or bash reports its end
}

lose() {
    signalled=1
    [[ ! $lost ]] || return 0
    { sleep "$lost_seconds"; kill -KILL -- "-$launcher"; } & # mpirun crashes of a SIGTERM then
    lost=$!
    disown "$lost"
}

# One rank is told, since they agree: a second one might get its signal when it has
# saved and ends already. Launchers tell the ranks too late, or lose their exit code.
# Where no rank is found, the launcher is ended.
ask_ranks() {
    local host
    for host in localhost "${hosts[@]}"; do
        [[ $(on_host 15 "for each in \$(grep -lsz '$marked' /proc/[0-9]*/environ | xargs -r grep -lszE '^(HOROVOD|OMPI_COMM_WORLD|PMI)_RANK='); do
    each=\${each%/environ}
    if grep -qsz '^train\$' \$each/cmdline && kill -TERM \${each#/proc/}; then echo told; exit; fi
done" "$host") != *told ]] || return 0
    done
    kill -TERM -- "-$launcher" 2>/dev/null || true
}

end_launcher() {
    kill -TERM -- "-$launcher" 2>/dev/null || return 0
    sleep "$end_seconds"
    kill -KILL -- "-$launcher" 2>/dev/null || true
}

# With --end: what another launch has left behind, and nothing else.
end_or_go_on() {
    [[ $end ]] || return 0
    marked="^HVDNOISE_LAUNCH=$end\$" patience=0
    sweep
    exit
}

# After a failure: ranks that are still there, and hosts that are not.
sweep() {
    local host state said
    while read -r host state said; do
        ((state == 255 || state == 124)) || continue
        lost_host=$host
        say "error: $(what_is_wrong "$host" 255 "$said" '') It was there at the start: look after it, then go on with --resume auto"
    done < <(everywhere 20 "n=0
while left=\$(grep -lsz '$marked' /proc/[0-9]*/environ) && [ \$n -lt $patience ]; do sleep 0.1; n=\$((n + 1)); done
for each in \$left; do each=\${each#/proc/}; kill -KILL \${each%/environ}; done")
}
