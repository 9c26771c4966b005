#!/usr/bin/env bash
# Builds the image of hvdnoise from this working tree, with docker, podman or buildah.
#
#     docker/build.sh [--variant cpu|gpu] [--target train|cluster] [--tag NAME:TAG]
#                     [--base IMAGE | --base debootstrap] [--builder docker|podman|buildah]
#                     [--newest] [--compile] [--no-cache] [--pin]
#
#   --variant   torch and Horovod without or with CUDA and NCCL (cpu)
#   --target    train: hvdnoise; cluster: and sshd, for runs across containers (train)
#   --tag       the image's name (hvdnoise:VARIANT, hvdnoise:VARIANT-cluster)
#   --base      a Debian 12 image; debootstrap: made here, as root, from Debian's mirror.
#               Left out: what docker/Dockerfile names, else debootstrap where that cannot be pulled
#   --builder   left out: the first of docker, podman and buildah that works
#   --newest    Debian packages as the mirror has them, not those of docker/apt.lock
#   --compile   builds Horovod anew, though ~/.cache/hvdnoise may have it
#   --no-cache  does every step again
#   --pin       builds nothing: writes docker/apt.lock anew, and the digest of the base
#               into docker/Dockerfile where a registry can be reached
#
# pip's and apt's configuration, their certificate and the proxies of this machine hold in the
# build, and are not in the image. SOURCE_DATE_EPOCH is the commit's time, unless it is set.
# Exit codes: 0 done, 1 the build failed, 2 bad input or nothing here that can build,
# 3 the mirror has the packages of docker/apt.lock no more.
set -euo pipefail
shopt -s nullglob

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
variant=cpu target=train tag='' base='' builder='' packages=locked compile='' pin=''
options=() work='' from=$root/docker/Dockerfile

say() { printf '%5d s  %s\n' "$SECONDS" "$*"; }

fail() { # EXIT_CODE MESSAGE
    printf 'build: %s\n' "$2" >&2
    exit "$1"
}

run() { # SECONDS COMMAND...: its output to the log; in the background, so that a signal ends it at once
    timeout --kill-after=20 "$@" >"$work/log" 2>&1 </dev/null &
    wait $!
}

clean_up() {
    local status=$? each
    trap '' INT TERM HUP
    each=$(jobs -p)
    [[ -z $each ]] || { kill -TERM $each && wait $each; } 2>/dev/null || true
    for each in $(awk -v "work=$work/" 'index($2, work) == 1 { print $2 }' /proc/mounts | sort -r); do
        umount -l "$each" 2>/dev/null || true # debootstrap's, when it was ended
    done
    rm -rf --one-file-system "$work"
    exit "$status"
}

# ------------------------------------------------------------------- what builds

docker_works() { # the first docker on the PATH that can build with mounts, as "docker"
    local each server
    why=
    for each in $(type -ap docker); do
        if ! server=$(timeout 20 "$each" version --format '{{.Server.Version}}' 2>&1); then
            case $server in
                *'ermission denied'*) why="user $EUID may not use docker; join the group docker, or use sudo" ;;
                *) why="docker's daemon does not answer; start it (systemctl start docker), or use --builder podman" ;;
            esac
        elif timeout 20 "$each" buildx version >/dev/null 2>&1 || # the client of 20.10 needs none
            [[ $("$each" version --format '{{.Client.Version}}') =~ ^(19|20|21|22)\. ]]; then
            docker=$each
            return
        else
            why="this docker has no buildx; install it (package docker-buildx-plugin or docker-buildx), or use --builder podman"
        fi
    done
    [[ $why ]] || why="no docker on the PATH; install it (Debian: apt-get install docker.io)"
    return 1
}

podman_works() {
    command -v podman >/dev/null || { why="no podman on the PATH; install it (Debian: apt-get install podman)"; return 1; }
    timeout 30 podman info >/dev/null 2>"$work/why" || { why="podman does not work here: $(tail -n 1 "$work/why")"; return 1; }
}

buildah_works() {
    command -v buildah >/dev/null || { why="no buildah on the PATH; install it (Debian: apt-get install buildah)"; return 1; }
    timeout 30 buildah info >/dev/null 2>"$work/why" || { why="buildah does not work here: $(tail -n 1 "$work/why")"; return 1; }
}

pick_builder() {
    local each reasons=''
    if [[ $builder ]]; then
        "${builder}_works" || fail 2 "$why"
        return
    fi
    for each in docker podman buildah; do
        if "${each}_works"; then
            builder=$each
            return
        fi
        reasons+="${reasons:+; }$why"
    done
    fail 2 "nothing here can build an image: $reasons"
}

engine() { "${docker:-$builder}" "$@"; } # ARGUMENTS...

build() { # DOCKERFILE TAG OPTIONS...: from the context, its output to the log
    local arguments=(-f "$work/context/docker/$1" -t "$2" --network host
        --build-arg SOURCE_DATE_EPOCH="$epoch" --build-arg PACKAGES="$packages" "${options[@]}" "${@:3}") name status=0
    for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
        [[ -z ${!name-} ]] || arguments+=(--build-arg "$name=${!name}") # known to builders: not kept
    done
    case $builder in
        docker) arguments=(build --progress plain "${arguments[@]}") ;;
        podman) arguments=(build --isolation chroot --layers=false --timestamp "$epoch" "${arguments[@]}") ;;
        buildah) arguments=(bud --isolation chroot --layers=false --timestamp "$epoch" "${arguments[@]}") ;;
    esac
    run 7200 "${docker:-$builder}" "${arguments[@]}" "$work/context" || status=$?
    ((status == 0)) && return
    if grep -q NOT-LOCKED "$work/log"; then
        fail 3 "the mirror has the packages of docker/apt.lock no more ($(sed -n 's/.*NOT-LOCKED //p' "$work/log" | head -n 1)); renew it with --pin, or build with --newest"
    fi
    tail -n 60 "$work/log" >&2
    fail 1 "$1 failed; see the lines above"
}

# ------------------------------------------------------------- the base and the context

mirror() { # of Debian 12, as this machine has it
    local codename
    codename=$(. /etc/os-release 2>/dev/null && echo "${VERSION_CODENAME-}")
    [[ $codename != bookworm ]] ||
        apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 2>/dev/null | awk '$2 == "bookworm" { print $1; exit }'
}

make_base() { # by debootstrap
    local where=$work/base uri
    uri=$(mirror)
    ((EUID == 0)) || fail 2 "$1; and debootstrap needs root: name a Debian 12 image with --base"
    command -v debootstrap >/dev/null || fail 2 "$1; and there is no debootstrap to make one: install it (Debian: apt-get install debootstrap), or name a Debian 12 image with --base"
    say "a base by debootstrap"
    run 600 debootstrap --variant=minbase bookworm "$where" "${uri:-http://deb.debian.org/debian}" ||
        { tail -n 5 "$work/log" >&2; fail 1 "debootstrap failed: Debian's mirror ${uri:-deb.debian.org} cannot be reached, or the disk is full"; }
    # What is of this machine, or of this moment, goes.
    printf 'deb http://deb.debian.org/%s main\n' 'debian bookworm' 'debian bookworm-updates' \
        'debian-security bookworm-security' >"$where/etc/apt/sources.list"
    rm -rf "$where"/etc/{resolv.conf,hostname,machine-id,*-} "$where"/debootstrap "$where"/dev/* \
        "$where"/var/{log,lib/apt/lists,cache/apt,cache/ldconfig}/* "$where"/var/lib/dpkg/*-old \
        "$where"/usr/share/{doc,man,locale,info}/*
    tar -C "$where" --sort=name --numeric-owner --mtime="@$epoch" --xattrs -cf "$work/base.tar" .
    rm -rf "$where"
    case $builder in
        buildah)
            local container
            container=$(buildah from scratch)
            buildah add -q "$container" "$work/base.tar" / >/dev/null
            buildah commit -q --timestamp "$epoch" "$container" "$base" >/dev/null
            buildah rm "$container" >/dev/null ;;
        *) engine import "$work/base.tar" "$base" >/dev/null 2>"$work/why" || fail 1 "$builder import: $(tail -n 1 "$work/why")" ;;
    esac
    rm -f "$work/base.tar"
}

there() { engine inspect --type image "$1" >/dev/null 2>&1; }

get_base() {
    local asked=$base
    [[ $base ]] || base=$(sed -n 's/^ARG BASE=//p' "$from")
    if [[ $base != debootstrap ]]; then
        there "$base" && return
        say "pulling $base"
        timeout 300 "${docker:-$builder}" pull -q "$base" >/dev/null 2>"$work/why" && return
        [[ -z $asked ]] || fail 2 "$base is neither here nor can it be pulled ($(tail -n 1 "$work/why" | cut -c 1-200)); name another with --base"
        asked="$base cannot be pulled"
    fi
    base=localhost/hvdnoise-base:bookworm
    there "$base" || make_base "$asked"
}

pip_config() { # the settings of this machine's pip, as "name=value" lines
    local each
    for each in "$root/.venv/bin/python" python3; do
        "$each" -m pip config list 2>/dev/null && return
    done | sed -nE "s/^(global|install|:env:)\.([a-z-]+)='(.*)'\$/\2=\3/p"
}

local_settings() { # FOLDER: what makes pip and apt reach their servers in the build
    local line name value each found=() certificate=${PIP_CERT:-}
    mkdir -p "$1/wheels"
    echo '[global]' >"$1/pip.conf"
    while IFS= read -r line; do
        name=${line%%=*} value=${line#*=}
        case $name in
            cert) certificate=$value ;;
            find-links | extra-index-url | index-url)
                found=()
                for each in $value; do
                    if [[ $each == *://* && $each != file://* ]]; then
                        found+=("$each")
                    elif [[ $name == find-links ]]; then
                        take_wheels "${each#file://}" "$1/wheels"
                        found+=(/mnt/local/wheels)
                    fi # an index in a folder would have to be copied whole
                done
                [[ -z ${found[*]} ]] || echo "$name = ${found[*]}" >>"$1/pip.conf" ;;
            trusted-host | proxy | default-timeout | retries) echo "$name = $value" >>"$1/pip.conf" ;;
        esac
    done < <(pip_config | awk -F= '!seen[$1]++')
    if [[ -s $certificate ]]; then
        cp -L "$certificate" "$1/ca.pem"
        echo 'cert = /mnt/local/ca.pem' >>"$1/pip.conf"
    fi
    apt-config dump 2>/dev/null | grep -E '^Acquire::(https?::|ForceIPv|Check-)' >"$1/apt.conf" || true
    value=$(mirror)
    case $value in
        '' | *deb.debian.org*) ;;
        *) apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' |
            grep ' bookworm[^ ]* ' | sort -u >"$1/sources.list" ;;
    esac
    if [[ -z $compile ]]; then
        for each in "${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}"/hvdnoise/horovod-*/; do
            grep -q "^$variant," "$each/recipe" 2>/dev/null || continue
            mkdir -p "$1/cache/hvdnoise"
            cp -r "$each" "$1/cache/hvdnoise/"
        done
    fi
}

take_wheels() { # FROM TO: those that the lock files name
    local name version
    while IFS='= ' read -r name version _; do
        name=${name//[-.]/[-_.]}
        for each in "$1"/${name}-"$version"-*.whl; do cp -L "$each" "$2/"; done
    done < <(sed -nE 's/^([a-zA-Z0-9_.-]+)==([^ ]+).*/\1=\2/p' "$root/launch/requirements.lock" "$root/launch/$variant.lock")
}

make_context() {
    local context=$work/context
    mkdir -p "$context/docker"
    cp -r "$root"/{hvdnoise,launch,setup.cfg,pyproject.toml,README.md,LICENSE} "$context/"
    find "$context" -name __pycache__ -prune -exec rm -rf {} +
    cp "$root"/docker/{Dockerfile,cluster.Dockerfile,stage.sh,slim.py,ssh.sh,apt.lock} "$context/docker/"
    local_settings "$context/docker/local"
}

# ------------------------------------------------------------------------- pins

write_pins() {
    local reference=$base digest
    reference=$(sed -n 's/^ARG BASE=\([^@]*\).*/\1/p' "$from")
    packages=pin
    build Dockerfile hvdnoise-pins --target base --no-cache --build-arg BASE="$base" || true
    {
        echo "# The Debian packages of the images, by stage of docker/stage.sh; written by docker/build.sh --pin."
        echo "# A mirror keeps only the newest; snapshot.debian.org has them all, as of this moment:"
        sed -nE 's/.*PIN ((snapshot [0-9TZ]+|[a-z]+ [^ ]+=[^ ]+)).*/\1/p' "$work/log"
    } >"$work/apt.lock"
    (($(wc -l <"$work/apt.lock") > 10)) || fail 1 "no packages were found; see the lines above"
    install -m 644 "$work/apt.lock" "$root/docker/apt.lock"
    say "docker/apt.lock: $(grep -c = "$work/apt.lock") packages"
    if timeout 300 "${docker:-$builder}" pull -q "$reference" >/dev/null 2>&1; then
        digest=$(engine inspect --type image --format '{{index .RepoDigests 0}}' "$reference")
        sed -i "s|^ARG BASE=.*|ARG BASE=$reference@${digest#*@}|" "$from"
        say "docker/Dockerfile: $reference@${digest#*@}"
    else
        say "docker/Dockerfile stays as it is: $reference cannot be pulled, so its digest is not known"
    fi
}

# -------------------------------------------------------------------- what is asked

while (($#)); do
    case $1 in
        --variant | --target | --tag | --base | --builder)
            [[ ${2-} ]] || fail 2 "$1 wants a value; see docker/build.sh --help"
            printf -v "${1#--}" %s "$2"
            shift ;;
        --newest) packages=newest ;;
        --compile) compile=1 ;;
        --no-cache) options+=(--no-cache) ;;
        --pin) pin=1 ;;
        -h | --help) sed -n '2,/^set -e/{/^set/d; s/^# \{0,1\}//; p}' "$0"; exit ;;
        *) fail 2 "unknown option '$1'; see docker/build.sh --help" ;;
    esac
    shift
done
[[ $variant =~ ^(cpu|gpu)$ ]] || fail 2 "--variant is '$variant'; give cpu or gpu"
[[ $target =~ ^(train|cluster)$ ]] || fail 2 "--target is '$target'; give train or cluster"
[[ $builder =~ ^(docker|podman|buildah|)$ ]] || fail 2 "--builder is '$builder'; give docker, podman or buildah"
[[ $tag =~ ^([a-z0-9._/:-]+:[A-Za-z0-9._-]+)?$ ]] || fail 2 "--tag is '$tag'; give a name and a tag, such as hvdnoise:cpu"

work=$(mktemp -d "${TMPDIR:-/tmp}/hvdnoise-build.XXXXXX")
trap clean_up EXIT
trap 'fail 130 interrupted' INT TERM HUP
export DOCKER_BUILDKIT=1
docker='' why=''
pick_builder

revision=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)
[[ $revision == unknown || -z $(git -C "$root" status --porcelain 2>/dev/null) ]] || revision+=-dirty
epoch=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct 2>/dev/null || echo 1735689600)}
version=$(sed -n 's/^version = //p' "$root/setup.cfg")
say "building with $builder"
get_base
make_context
if [[ $pin ]]; then
    write_pins
    exit
fi

train=$tag
[[ $target == train && $tag ]] || train=hvdnoise:$variant
say "$train from $base"
build Dockerfile "$train" --build-arg BASE="$base" --build-arg VARIANT="$variant" \
    --build-arg VERSION="$version" --build-arg REVISION="$revision"
tag=${tag:-$train}
if [[ $target == cluster ]]; then
    [[ $tag != "$train" ]] || tag=$train-cluster
    say "$tag from $train"
    image=$train
    [[ $builder == docker ]] || image=localhost/$train
    build cluster.Dockerfile "$tag" --build-arg IMAGE="$image"
fi
case $builder in
    buildah) facts=$(buildah inspect --type image --format '{{.FromImageID}}' "$tag") ;;
    *) facts=$(engine inspect --type image --format '{{.Id}} {{.Size}}' "$tag") ;;
esac
[[ $facts == sha256:* ]] || facts=sha256:$facts
set -- $facts
say "$tag is ready: $1${2:+, $(($2 / 1000000)) MB}"
