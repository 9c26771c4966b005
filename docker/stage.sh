#!/usr/bin/env bash
# The steps of the images' build, run inside it by the Dockerfiles.
#
#     stage.sh packages STAGE       installs the Debian packages of a stage (below)
#     stage.sh user                 makes the user of the image
#     stage.sh environment VARIANT  makes /opt/hvdnoise by launch/setup.sh
#     stage.sh project              installs hvdnoise and its launch scripts there, leaves what runs need
#     stage.sh record               writes down what the image is made of
#     stage.sh cluster              sets up ssh between containers
#
# PACKAGES says which versions of the Debian packages: those of apt.lock ("locked"), what the
# mirror has ("newest"), or "pin": what the mirror has is printed in the lines of apt.lock.
set -euo pipefail
shopt -s nullglob

here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
local=$here/local # what only the build needs
venv=/opt/hvdnoise
export DEBIAN_FRONTEND=noninteractive PYTHONDONTWRITEBYTECODE=1

declare -A names=(
    [run]='python3 openssh-client ca-certificates'
    [venv]='python3-venv'
    [compiler]='g++ python3-dev'
    [cluster]='openssh-server'
)

fail() {
    printf 'image: %s\n' "$*" >&2
    exit 1
}

# ---------------------------------------------------------------- Debian's packages

apt=(apt-get -qq -o Acquire::Retries=3 -o DPkg::Use-Pty=0)
if [[ -s $local/sources.list ]]; then
    apt+=(-o "Dir::Etc::SourceList=$local/sources.list" -o Dir::Etc::SourceParts=/dev/null)
fi
[[ ! -s $local/apt.conf ]] || export APT_CONFIG=$local/apt.conf

packages() { # STAGE
    local wanted stage
    # No service may start, and no documentation is kept.
    printf '#!/bin/sh\nexit 101\n' | install -m 755 /dev/stdin /usr/sbin/policy-rc.d
    printf 'path-exclude=/usr/share/%s/*\n' doc man locale info >/etc/dpkg/dpkg.cfg.d/slim
    "${apt[@]}" update || fail "Debian's packages: the mirror cannot be reached; check the network and the proxy"
    if [[ ${PACKAGES-} == pin ]]; then
        echo "PIN snapshot $(sed -n 's/^Date: //p' /var/lib/apt/lists/*InRelease |
            while read -r date; do date -ud "$date" +%Y%m%dT%H%M%SZ; done | sort | tail -n 1)"
        for stage in run venv compiler cluster; do
            "${apt[@]}" -s install --no-install-recommends ${names[run]} ${names[$stage]} |
                sed -n "s/^Inst \([^ ]*\).* (\([^ ]*\) .*/PIN $stage \1=\2/p" | sort
        done | awk '$2 == "run" { run[$3] } $2 == "run" || !($3 in run)'
        exit
    fi
    wanted=${names[$1]}
    if [[ ${PACKAGES-} != newest ]]; then
        wanted=$(awk -v "stage=$1" '$1 == stage { print $2 }' "$here/apt.lock")
        "${apt[@]}" -s install $wanted >/dev/null 2>/tmp/why || locked_in_the_past
    fi
    "${apt[@]}" install -y --no-install-recommends $wanted || fail "Debian's packages of stage $1 could not be installed"
    tidy
}

locked_in_the_past() { # a mirror keeps the newest only; snapshot.debian.org keeps all
    local stamp list=/tmp/snapshot.list
    stamp=$(awk '$1 == "snapshot" { print $2 }' "$here/apt.lock")
    printf "deb [check-valid-until=no] http://snapshot.debian.org/archive/%s/$stamp %s main\n" \
        debian bookworm debian bookworm-updates debian-security bookworm-security >$list
    apt+=(-o Dir::Etc::SourceList=$list -o Dir::Etc::SourceParts=/dev/null)
    "${apt[@]}" update 2>/dev/null || true
    "${apt[@]}" -s install $wanted >/dev/null 2>>/tmp/why ||
        fail "NOT-LOCKED $(sed -n 's/^E: //p' /tmp/why | head -n 1) and snapshot.debian.org is out of reach"
}

tidy() { # what differs from build to build, or is of no use
    "${apt[@]}" clean
    rm -rf /var/lib/apt/lists/* /var/cache/{apt,ldconfig,debconf}/* /var/log/* /tmp/* \
        /var/lib/dpkg/*-old /etc/{passwd,group,shadow,gshadow,subuid,subgid}- /etc/machine-id \
        /etc/ssh/ssh_host_* /usr/sbin/policy-rc.d
    find / -xdev -name __pycache__ -not -path "$venv/*" -prune -exec rm -rf {} +
    same_times
}

same_times() { # of all that this build has touched
    find / -xdev \( -path /mnt -o -path /proc -o -path /sys -o -path /dev \) -prune -o \
        -newermt "@$SOURCE_DATE_EPOCH" -print0 | xargs -0r touch -hd "@$SOURCE_DATE_EPOCH" 2>/dev/null || true
}

# ------------------------------------------------------------------ what runs in it

user() {
    useradd --uid 1000 --user-group --home-dir /home/hvdnoise --create-home --shell /bin/bash hvdnoise
    sed -i 's/^\(hvdnoise:[^:]*:\)[0-9]*/\10/' /etc/shadow # no date of today
    install -d -o 1000 -g 1000 /work /work/data /work/runs # so that volumes there are the user's
    tidy
}

environment() { # VARIANT
    local wheels=("$local"/cache/hvdnoise/*/horovod-*.whl)
    packages venv
    ((${#wheels[@]})) || packages compiler
    export PIP_NO_CACHE_DIR=1 XDG_CACHE_HOME=$local/cache
    [[ ! -s $local/pip.conf ]] || export PIP_CONFIG_FILE=$local/pip.conf
    /src/launch/setup.sh "--$1" --venv "$venv" --deps-only && return
    if ((${#wheels[@]})); then # none of them fits
        packages compiler
        /src/launch/setup.sh "--$1" --venv "$venv" --deps-only && return
    fi
    tail -n 40 "$venv.log" >&2
    exit 1
}

project() {
    "$venv/bin/python" -m pip install -q --no-deps --no-build-isolation --no-index --no-compile /src
    "$venv/bin/python" "$here/slim.py" "$venv"
    mkdir "$venv/launch"
    cp -r /src/launch/{horovodrun.sh,mpirun.sh,hosts.sh,bin,quickstart.yaml} "$venv/launch/"
    # Bytecode that trusts its source: a user who is not root could write none.
    find "$venv" -name __pycache__ -prune -exec rm -rf {} +
    PYTHONHASHSEED=0 "$venv/bin/python" -m compileall -q --invalidation-mode unchecked-hash "$venv/lib" || true
    same_times
}

record() {
    python3 - "$venv" <<'PY'
import hashlib, importlib.metadata, json, os, subprocess, sys
venv = sys.argv[1]
site = os.path.join(venv, "lib", "python%d.%d" % sys.version_info[:2], "site-packages")
python = sorted(f"{each.metadata['Name']}=={each.version}"
                for each in importlib.metadata.distributions(path=[site]))
debian = subprocess.run(["dpkg-query", "-W"], capture_output=True, text=True, check=True).stdout
digest = hashlib.sha256("\n".join([*python, debian]).encode()).hexdigest()
facts = {key: os.environ[key.upper()] for key in ("version", "revision", "variant", "base")}
with open(os.path.join(venv, "image.json"), "w") as file:
    json.dump({**facts, "packages_sha256": digest}, file, indent=1)
    file.write("\n")
PY
    same_times
}

cluster() {
    install -m 755 "$here/ssh.sh" "$venv/bin/hvdnoise-sshd"
    ln -s hvdnoise-sshd "$venv/bin/ssh" # before Debian's on the PATH
    install -d -m 700 -o 1000 -g 1000 /ssh
    tidy
}

case ${1-} in
    packages | user | environment | project | record | cluster) "$@" ;;
    *) fail "unknown step '${1-}'" ;;
esac
