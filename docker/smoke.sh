#!/usr/bin/env bash
# Builds the image and sees that it works: looks into it, trains in one container, then
# across two and three on a network of their own, and compares the weights.
#
#     docker/smoke.sh [--builder docker|podman|buildah] [--twice] [OPTIONS OF docker/build.sh]
#
#   --builder   left out: docker, also where its daemon has yet to be started, else podman.
#               What buildah has built runs under podman
#   --twice     builds a second time, without caches, and compares the images
#
# Needs root, and nothing of Debian's but docker.io, podman or both (and buildah); the base is
# made by debootstrap where no registry can be reached. A daemon that this starts, and podman's
# images, live in a temporary folder and go with it; nothing is left running or mounted. Where
# .venv is there, the same run outside of the image is compared, too.
# Exit codes: 0 all is well, 1 something is not, 2 bad input or nothing here to do it with.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(dirname "$here")
engine=docker builder='' variant=cpu twice='' options=() work='' daemon='' network='' failed='' told=''
name=hvdnoise-smoke-$$

say() { printf '%5d s  %s\n' "$SECONDS" "$*"; }

fail() { # EXIT_CODE MESSAGE
    told=1
    printf 'smoke: %s\n' "$2" >&2
    exit "$1"
}

# --------------------------------------------------------------- engines, and their end

clean_up() {
    local status=$? each
    trap '' INT TERM HUP
    end_children
    ((status == 0)) || [[ $told ]] || printf 'smoke: stopped where it should not, with status %s\n' "$status" >&2
    if [[ $network ]]; then
        containers rm -f $(containers ps -aq --filter "name=$name") >/dev/null 2>&1 || true
        containers network rm "$network" >/dev/null 2>&1 || true
        rm -rf "/var/lib/cni/networks/$name" # podman's list of addresses
    fi
    if [[ $daemon ]]; then
        kill "$daemon" 2>/dev/null || true
        for each in {1..100}; do kill -0 "$daemon" 2>/dev/null && sleep 0.2 || break; done
        kill -KILL "$daemon" 2>/dev/null || true
    fi
    for each in $(awk -v "work=$work/" 'index($2, work) == 1 { print $2 }' /proc/mounts | sort -r); do
        umount -l "$each" 2>/dev/null || true
    done
    rm -rf --one-file-system "$work"
    exit "$status"
}

end_children() { # all but the daemon
    local each children=''
    for each in $(jobs -p); do [[ $each == "$daemon" ]] || children+=" $each"; done
    [[ -z $children ]] || { kill -TERM $children && wait $children; } 2>/dev/null || true
}

run() { # COMMAND...: in the background, so that a signal ends the wait at once
    "$@" &
    wait $!
}

containers() { timeout --foreground 300 "$engine" "$@"; }

own_daemon() { # dockerd, in the temporary folder: it touches no network of this machine
    local client
    mkdir "$work/docker"
    setpriv --pdeathsig TERM dockerd --storage-driver overlay2 --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false \
        --bridge=none --userland-proxy=false --data-root "$work/docker/data" --exec-root "$work/docker/exec" \
        --pidfile "$work/docker/pid" -H "unix://$work/docker/socket" >"$work/docker/log" 2>&1 &
    daemon=$!
    export DOCKER_HOST=unix://$work/docker/socket
    for _ in {1..100}; do
        kill -0 "$daemon" 2>/dev/null || break
        containers info >/dev/null 2>&1 && return
        sleep 0.2
    done
    fail 2 "dockerd does not start here: $(grep -o 'level=\(fatal\|error\).*\|^failed.*' "$work/docker/log" | tail -n 1)"
}

own_storage() { # podman's and buildah's, in the temporary folder
    printf '[storage]\ndriver = "overlay"\ngraphroot = "%s"\nrunroot = "%s"\n' \
        "$work/storage" "$work/run" >"$work/storage.conf"
    printf '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n[containers]\ndefault_ulimits = []\n[network]\nnetwork_config_dir = "%s"\n' \
        "$work/networks" >"$work/containers.conf"
    mkdir "$work/networks"
    export CONTAINERS_STORAGE_CONF=$work/storage.conf CONTAINERS_CONF=$work/containers.conf
}

pick_engine() {
    if [[ -z $builder ]]; then
        builder=podman
        ! command -v dockerd >/dev/null && ! timeout 20 docker info >/dev/null 2>&1 || builder=docker
    fi
    if [[ $builder == docker ]]; then
        timeout 20 docker info >/dev/null 2>&1 && return
        command -v dockerd >/dev/null ||
            fail 2 "docker's daemon does not answer, and there is no dockerd to start; install docker.io, or use --builder podman"
        say "docker's daemon does not answer: starting one of our own"
        own_daemon
    else
        command -v podman >/dev/null || fail 2 "no podman on the PATH; install it (Debian: apt-get install podman)"
        engine=podman
        own_storage
    fi
}

# ------------------------------------------------------------------- build and look

build() { # TAG OPTIONS...
    local status=0 arguments=(--builder "$builder" --variant "$variant" --target cluster --tag "$@" "${options[@]}")
    run "$here/build.sh" "${arguments[@]}" || status=$?
    if ((status == 3)) && [[ " ${options[*]} " != *' --newest '* ]]; then
        say "building with the mirror's newest packages instead"
        options+=(--newest)
        status=0
        run "$here/build.sh" "${arguments[@]}" --newest || status=$?
    fi
    ((status == 0)) || fail "$((status == 2 ? 2 : 1))" "the image could not be built"
}

inside() { # COMMAND...: in a container without a network
    containers run --rm --network none --name "$name-look" --entrypoint "$1" "$image" "${@:2}"
}

check() { # WHAT COMMAND...
    if "${@:2}"; then say "ok: $1"; else say "FAILED: $1"; failed=1; fi
}

empty() { [[ -z $1 ]] || { printf '    %s\n' "$1" | head -n 5; return 1; }; }
equal() { (($# > 1)) && [[ $1 && -z $(printf '%s\n' "$@" | grep -vxF -- "$1") ]] || { printf '    %s\n' "$@"; return 1; }; }

of_this_machine() { # what would betray where the image was built
    local each
    printf '%s/\n' "$root" "$work" "${HOME:-/root}/.cache"
    [[ ${HOSTNAME:-localhost} == localhost || ${#HOSTNAME} -lt 4 ]] || printf '%s\n' "$HOSTNAME"
    awk '$1 == "nameserver" && $2 !~ /^127/ { print $2 }' /etc/resolv.conf
    for each in ${http_proxy-} ${https_proxy-} ${HTTP_PROXY-} ${HTTPS_PROXY-}; do sed 's#.*[/@]##' <<<"${each%/}"; done
    { python3 -m pip config list 2>/dev/null || true; } |
        grep -oE "(https?|file)://[^' ]*" | sed -E 's#^(file)://##; s#https?://([^/@]*@)?##; s#/.*##' |
        grep -vxE '|pypi.org|download.pytorch.org' || true
}

look_inside() {
    local found traces=$work/traces
    found=$(containers inspect --type image --format '{{.Config.User}}' "$image")
    check "its user is not root" equal "$found" 1000:1000
    check "it names its version and revision" grep -qE '^[0-9][0-9.]+ ([0-9a-f]{40}(-dirty)?|unknown)$' <<<"$(containers inspect --type image \
        --format '{{index .Config.Labels "org.opencontainers.image.version"}} {{index .Config.Labels "org.opencontainers.image.revision"}}' "$image")"
    inside bash -c 'for each in cc gcc g++ c++ clang cc1plus nvcc make cmake pip pip3; do command -v $each; done
        ls /usr/lib/gcc* 2>/dev/null; find / -xdev -name "*.a" -size +1k 2>/dev/null; true' >"$work/tools" || fail 1 "the image does not run"
    check "no compiler in it" empty "$(<"$work/tools")"
    # As root, to see all. Programs that can read keys contain these words, too: hence text only.
    found=$(containers run --rm --network none --name "$name-look" --user 0:0 --entrypoint bash "$image" -c '
        grep -rIlE --exclude-dir={proc,sys,dev} -e "^-----BEGIN .*PRIVATE KEY-----" / 2>/dev/null
        find / -xdev \( -name "ssh_host_*" -o -name "id_*sa" -o -name "id_ed25519*" -o -name ".netrc" -o -name "pip.conf" \) 2>/dev/null
        find /ssh /root /home/hvdnoise/.cache /tmp /var/cache/apt /var/lib/apt/lists /usr/local/share/ca-certificates \
            -xdev -type f -not -name ".bash*" -not -name .profile 2>/dev/null; true')
    check "no keys, secrets and caches in it" empty "$found"
    of_this_machine | sort -u | grep . >"$traces"
    containers history --no-trunc "$image" >"$work/seen"
    containers inspect --type image --format '{{json .Config}}' "$image" >>"$work/seen"
    check "no trace of this machine in its environment and history" empty "$(grep -oFf "$traces" "$work/seen" | sort -u || true)"
    grep / "$traces" >"$traces.paths" # short names are in programs by chance
    found=$(containers run --rm --network none --name "$name-look" --user 0:0 --volume "$traces:/traces:ro" \
        --volume "$traces.paths:/paths:ro" --entrypoint bash "$image" -c '
        where=(/etc /opt /home /root /var /usr/local --exclude={hosts,hostname,resolv.conf})
        grep -rIlFf /traces "${where[@]}" 2>/dev/null; grep -rlaFf /paths "${where[@]}" 2>/dev/null; true')
    check "nor in its files" empty "$found"
}

compare_builds() {
    local tree='import hashlib, os, stat
total = hashlib.sha256()
for folder, folders, files in os.walk("/"):
    folders[:] = sorted(each for each in folders if os.path.join(folder, each) not in ("/proc", "/sys", "/dev", "/run"))
    for path in (os.path.join(folder, each) for each in sorted(files + folders)):
        if path in ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/.dockerenv", "/etc/mtab"):
            continue
        facts = os.lstat(path)
        total.update(f"{path} {facts.st_mode} {facts.st_uid} {facts.st_gid}\n".encode())
        if stat.S_ISLNK(facts.st_mode):
            total.update(os.readlink(path).encode())
        elif stat.S_ISREG(facts.st_mode):
            total.update(hashlib.file_digest(open(path, "rb"), "sha256").digest())
print(total.hexdigest())'
    local each other trees=() layers=() records=()
    other=$image-again
    build "$other" --no-cache
    for each in "$image" "$other"; do
        records+=("$(containers run --rm --network none --entrypoint cat "$each" /opt/hvdnoise/image.json)")
        trees+=("$(containers run --rm --network none --user 0:0 --entrypoint python3 "$each" -c "$tree")")
        layers+=("$(containers inspect --type image --format '{{json .RootFS.Layers}}' "$each")")
    done
    check "two builds have the same packages" equal "${records[@]}"
    check "two builds have the same files" equal "${trees[@]}"
    if [[ $engine == docker && ${layers[0]} != "${layers[1]}" ]]; then
        say "note: their layer digests differ in times that docker's builder writes"
    else
        check "two builds have the same layer digests" equal "${layers[@]}"
    fi
}

# ------------------------------------------------------------------------- training

train=(hvdnoise train --data.dataset synthetic --data.num_examples 192 --data.image_size 8 --data.batch_size 8
    --model small-cnn --epochs 1 --virtual_workers 2 --noise.kind gnc --noise.source gathered --noise.radius 0.05
    --tensorboard false --run_dir)

make_network() {
    local third
    for third in {201..220}; do
        subnet=10.$third.77
        containers network create --internal --subnet "$subnet.0/24" "$name" >"$work/why" 2>&1 && network=$name && return
    done
    fail 1 "no network for containers: $(tail -n 1 "$work/why")"
}

machine() { # NUMBER KEYS OPTIONS...: arguments of a container that is one of several machines
    printf '%s\n' run --network "$network" --ip "$subnet.1$1" --name "$name-node$1" --hostname "node$1" \
        --add-host "node1:$subnet.11" --add-host "node2:$subnet.12" --add-host "node3:$subnet.13" \
        --add-host "stranger:$subnet.19" --env OMP_NUM_THREADS=1 --env HVDNOISE_IMAGE="$digest" \
        --volume "$work/runs:/work/runs" --volume "$work/$2:/ssh" "${@:3}"
}

start_machine() { # NUMBER KEYS
    local arguments
    mapfile -t arguments < <(machine "$@" --detach --entrypoint hvdnoise-sshd "$image")
    containers "${arguments[@]}" >/dev/null 2>"$work/why" || fail 1 "node$1 does not start: $(tail -n 1 "$work/why")"
}

weights() { # RUN: the digest of its final weights
    sed -n 's/.*"weights_sha256": "\(.*\)".*/\1/p' "$work/runs/$1/summary.json" 2>/dev/null || true
}

trained() { # RUN COMMAND...: quiet where all is well
    local run=$1 status=0
    shift
    run timeout --kill-after=5 120 "$@" "$run" >"$work/said" 2>&1 </dev/null || status=$?
    ((status == 0)) && [[ $(weights "${run##*/}") ]] && return
    tail -n 30 "$work/said"
    return 1
}

train_in_one_container() {
    local arguments outside=none
    mapfile -t arguments < <(machine 1 keys --rm --entrypoint horovodrun "$image")
    arguments+=(--gloo --network-interface lo -np 2)
    check "two ranks train in one container" trained runs/one "$engine" "${arguments[@]}" "${train[@]}"
    check "the run folder names the image" grep -q "\"digest\": \"$digest\"" "$work/runs/one/environment.json"
    check "its config.yaml is run again" trained runs/two \
        "$engine" "${arguments[@]}" hvdnoise train --config runs/one/config.yaml --run_dir
    check "with the same weights" equal "$(weights one)" "$(weights two)"
    [[ ! -x $root/.venv/bin/hvdnoise ]] ||
        outside=$("$root/.venv/bin/python" -c 'import torch; print("gpu" if torch.version.cuda else "cpu")')
    if [[ $outside != "$variant" ]]; then
        say "note: no .venv of variant $variant, and so no weights of outside to compare"
    else
        check "two ranks train outside of the image" trained "$work/runs/outside" env OMP_NUM_THREADS=1 PATH="$root/.venv/bin:$PATH" \
            "$root/.venv/bin/horovodrun" --gloo --network-interface lo --disable-cache -np 2 "${train[@]}"
        check "with the weights of inside" equal "$(weights one)" "$(weights outside)"
    fi
}

train_across_containers() {
    local each ranks hosts=node1:1 controller
    install -d -m 700 -o 1000 -g 1000 "$work/keys" "$work/other-keys"
    for each in 1 2 3; do start_machine "$each" keys; done
    start_machine 9 other-keys
    for each in node1 node2 node3; do
        check "ssh reaches $each" timeout 30 bash -c "until $engine exec $name-node1 ssh $each true; do sleep 0.3; done" 2>/dev/null
    done
    until containers exec "$name-node9" bash -c "</dev/tcp/$subnet.19/2222" 2>/dev/null || ((SECONDS > 900)); do sleep 0.2; done
    check "a host with another key is refused" \
        grep -q 'Host key verification failed' <<<"$(containers exec "$name-node1" ssh stranger true 2>&1)"
    for ranks in 2 3; do
        hosts+=,node$ranks:1
        for controller in gloo mpi; do
            check "$ranks ranks train on $ranks containers over $controller" trained "runs/$controller-$ranks" \
                "$engine" exec "$name-node1" horovodrun "--$controller" --network-interface eth0 -np "$ranks" -H "$hosts" "${train[@]}"
        done
    done
    check "with the weights of one container" equal "$(weights one)" "$(weights gloo-2)" "$(weights mpi-2)"
    for controller in gloo mpi; do # they add in different orders
        check "three ranks train on one container over $controller" trained "runs/$controller-one" "$engine" exec "$name-node1" \
            horovodrun "--$controller" --network-interface lo -np 3 -H localhost:3 "${train[@]}"
        check "with the weights of three" equal "$(weights "$controller-one")" "$(weights "$controller-3")"
    done
}

# --------------------------------------------------------------------- what is asked

while (($#)); do
    case $1 in
        --builder | --variant)
            [[ ${2-} ]] || fail 2 "$1 wants a value; see docker/smoke.sh --help"
            printf -v "${1#--}" %s "$2"
            shift ;;
        --twice) twice=1 ;;
        --base)
            [[ ${2-} ]] || fail 2 "$1 wants a value; see docker/build.sh --help"
            options+=("$1" "$2")
            shift ;;
        --newest | --compile | --no-cache) options+=("$1") ;;
        -h | --help) sed -n '2,/^set -e/{/^set/d; s/^# \{0,1\}//; p}' "$0"; exit ;;
        *) fail 2 "unknown option '$1'; see docker/smoke.sh --help" ;;
    esac
    shift
done
[[ $builder =~ ^(docker|podman|buildah|)$ ]] || fail 2 "--builder is '$builder'; give docker, podman or buildah"
((EUID == 0)) || fail 2 "runs as root only, and you are user $EUID; use sudo"

work=$(mktemp -d "${TMPDIR:-/tmp}/hvdnoise-smoke.XXXXXX")
chmod 755 "$work"
trap clean_up EXIT
trap 'fail 130 interrupted' INT TERM HUP
pick_engine
image=hvdnoise:$variant-cluster
build "$image"
digest=$(containers inspect --type image --format '{{.Id}}' "$image")
digest=sha256:${digest#sha256:}
look_inside
install -d -m 777 "$work/runs"
install -d -m 700 -o 1000 -g 1000 "$work/keys"
make_network
mapfile -t doctor < <(machine 1 keys --rm --entrypoint hvdnoise "$image")
check "hvdnoise doctor finds nothing broken" containers "${doctor[@]}" doctor
train_in_one_container
train_across_containers
[[ -z $twice ]] || compare_builds
[[ -z $failed ]] || fail 1 "see the lines with FAILED"
say "all is well"
