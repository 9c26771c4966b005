#!/usr/bin/env bash
# Runs the commands of docs/environments.md for an MPI of Debian's in a fresh Debian 12, as they stand,
# and compares the weights with those of this repository's .venv.
#
#     tests/system_mpi.sh openmpi|mpich [FOLDER]
#
#   FOLDER   holds the Debian; kept, and used again. Left out: a temporary one
#
# Needs root, debootstrap, Debian's mirror and a package index. Horovod is built once for each MPI
# (minutes) and kept in the same cache as ever. VENV names another environment to compare with.
# Exit codes: 0 all is well, 1 something is not, 2 bad input or nothing here to do it with.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
page=$root/docs/environments.md
venv=${VENV:-$root/.venv}
cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/hvdnoise
train=(--config launch/quickstart.yaml --data.limit 2048 --epochs 1)
failed=''

say() { printf '%5d s  %s\n' "$SECONDS" "$*"; }

fail() { # EXIT_CODE MESSAGE
    printf 'system_mpi: %s\n' "$2" >&2
    exit "$1"
}

[[ ${1-} =~ ^(openmpi|mpich)$ ]] || fail 2 "the MPI is '${1-}'; give openmpi or mpich"
((EUID == 0)) || fail 2 "runs as root only, and you are user $EUID; use sudo"
command -v debootstrap >/dev/null || fail 2 "no debootstrap; install it (Debian: apt-get install debootstrap)"
block=$(awk -v "mark=<!-- run by tests/system_mpi.sh: $1 -->" '$0 == mark { found = 1; next }
    found && /^```/ { if (inside) exit; inside = 1; next } inside' "$page")
[[ $block ]] || fail 1 "$page has no commands for $1"

work=$(mktemp -d "${TMPDIR:-/tmp}/hvdnoise-system.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT TERM HUP
system=${2:-$work/system}
mkdir -p "$system" "$cache"

# ------------------------------------------------------------------ a Debian, and the files in it

if [[ ! -e $system/.made ]]; then
    say "Debian 12 in $system"
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 2>/dev/null | awk '$2 == "bookworm" { print $1; exit }' || true)
    timeout 600 debootstrap --variant=minbase bookworm "$system" "${mirror:-http://deb.debian.org/debian}" >"$work/log" ||
        fail 1 "debootstrap failed: $(tail -n 1 "$work/log")"
    printf '#!/bin/sh\nexit 101\n' | install -m 755 /dev/stdin "$system/usr/sbin/policy-rc.d" # no service starts
    touch "$system/.made"
fi
mkdir -p "$system"/{src,etc/ssl/certs,root/.cache/hvdnoise}
(cd "$root" && git ls-files -co --exclude-standard | tar -c -T - | tar -x -C "$system/src")
rm -rf "$system/src/runs"
cp -L /etc/resolv.conf "$system/etc/resolv.conf"
printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$(hostname)" >"$system/etc/hosts" # as in any container
[[ ! -s ${PIP_CERT-} ]] || cp -L "$PIP_CERT" "$system/etc/ssl/certs/ca-certificates.crt"
apt-config dump 2>/dev/null | grep -E '^Acquire::(https?::|ForceIPv)' >"$system/etc/apt/apt.conf.d/99-of-this-machine" || true
python3 -m pip config list 2>/dev/null | sed -nE "s/^(global|install|:env:)\.([a-z-]+)='(.*)'\$/\2=\3/p" |
    awk -F= '$1 ~ /^(cert|index-url|extra-index-url|find-links|trusted-host|proxy|default-timeout)$/ && !seen[$1]++' >"$work/pip"
{ echo '[global]'; cat "$work/pip"; } >"$system/etc/pip.conf"
mapfile -t folders < <(grep -oE '(file://|[ =])/[^ ]+' "$work/pip" | sed -E 's#^(file://|[ =])##; s#/simple$##' | sort -u)

inside() { # SCRIPT of bash: in namespaces of its own, so that nothing is left mounted or running
    unshare --mount --pid --fork --kill-child --propagation private bash -euc '
        system=$1 cache=$2; shift 3
        mount -t proc proc "$system/proc"; mount --rbind /dev "$system/dev"; mount --bind /sys "$system/sys"
        for each in "$@"; do
            [[ -d $each ]] || continue
            mkdir -p "$system$each"; mount --bind "$each" "$system$each"
        done
        mount --bind "$cache" "$system/root/.cache/hvdnoise"
        exec chroot "$system" env -i HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
            LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 \
            OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 bash -euxc "$SCRIPT"' bash "$system" "$cache" - "${folders[@]}"
}

# ---------------------------------------------------------------------- the commands, as they stand

say "the commands of docs/environments.md"
SCRIPT='apt-get -qq update; apt-get -qq install -y ca-certificates openssh-client >/dev/null' inside ||
    fail 1 "apt-get does not work in the new Debian"
[[ ! -s ${PIP_CERT-} ]] || cp -L "$PIP_CERT" "$system/etc/ssl/certs/ca-certificates.crt" # the package has written its own
SCRIPT="cd /src
$block" inside || fail 1 "a command ended with status $?"

weights() { sed -n 's/.*"weights_sha256": "\(.*\)".*/\1/p' "$1/summary.json" 2>/dev/null; }

if [[ -x $venv/bin/hvdnoise ]]; then
    say "the same with $venv"
    (cd "$root" && export PATH=$venv/bin:$PATH PYTHONPATH=$root OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        timeout 300 launch/mpirun.sh -np 2 -- "${train[@]}" --run_dir "$work/runs/default-mpirun" >"$work/log" 2>&1 &&
            timeout 300 launch/horovodrun.sh -np 2 -- "${train[@]}" --run_dir "$work/runs/default-gloo" >"$work/log" 2>&1) ||
        fail 1 "the environment to compare with does not train: $(tail -n 1 "$work/log")"
else
    say "note: no $venv to compare with"
fi
first=''
for run in "$system"/src/runs/* "$work"/runs/*; do
    [[ -d $run ]] || continue
    found=$(weights "$run")
    first=${first:-$found}
    say "$(printf '%-16s %s' "${run##*/}" "${found:-no weights}")"
    [[ $found && $found == "$first" ]] || failed=1
done
[[ $first && ! $failed ]] || fail 1 "the weights are not the same"
say "all is well"
