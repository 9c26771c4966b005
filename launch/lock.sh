#!/usr/bin/env bash
# Makes requirements.lock and gpu.lock again from the .in files; needs uv.
# cpu.lock and horovod.lock are kept by hand: their pins change together with
# launch/horovod.patch and want a new build and a test run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

compile() { # NAME, and on stdin the packages to leave out
    echo "locking $1"
    uv pip compile --quiet --universal --python-version 3.10 --generate-hashes \
        --excludes /dev/stdin --custom-compile-command launch/lock.sh \
        --output-file "$1.lock" "${@:2}" "$1.in"
}

printf '%s\n' torch torchvision | compile requirements "$@"

# What requirements.lock has already is left out.
sed -n 's/^\([a-z0-9-]*\)==.*/\1/p' requirements.lock | sort -u | compile gpu "$@"

# "===": a "+cpu" build of the same version must not be taken for it.
sed -i -E 's/^(torch|torchvision)==/\1===/' gpu.lock
