#!/usr/bin/env bash
# Checks the whole repository: set-up, style, types, API reference, tests.
#
#     launch/test.sh [--quick] [PYTEST OPTION]...
#
#   --quick   without the reference and of the tests those alone that are quick
#             and start no ranks: about 5 minutes. It comes first.
#
# Further options go to pytest, for instance: launch/test.sh tests/unit -k noise
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

quick=''
if [[ ${1-} == --quick ]]; then
    quick=1
    shift
fi

launch/setup.sh

# In a container all is root, and Open MPI wants to be told that this is meant.
if [[ $EUID == 0 ]]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # several ranks share the cores

results=() failed=0
check() { # NAME SECONDS COMMAND...
    local start=$SECONDS status=0
    printf '\n== %s\n' "$1"
    timeout --foreground --signal=INT --kill-after=30 "$2" "${@:3}" || status=$?
    results+=("$(printf '%-7s %-8s %5d s' "$( ((status)) && echo FAILED || echo ok)" "$1" $((SECONDS - start)))")
    ((status == 0)) || failed=1
}

code=(hvdnoise tests docs/examples)
check flake8 120 .venv/bin/python -m flake8 "${code[@]}"
check isort 120 .venv/bin/python -m isort --check --diff "${code[@]}"
check mypy 600 .venv/bin/python -m mypy hvdnoise
if [[ $quick ]]; then # -o testpaths: paths among the further options take its place
    check pytest 600 .venv/bin/python -m pytest -o testpaths=tests/unit \
        -m 'not (parallel or slow or gpu or namespaces or containers or slurm)' "$@"
elif (($#)); then
    check docs 600 .venv/bin/python -m tests.api_docs
    check pytest 4800 .venv/bin/python -m pytest --durations=40 "$@"
else
    check docs 600 .venv/bin/python -m tests.api_docs
    # A unit test seldom uses more than one core: two halves at a time.
    trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
    units=(tests/unit/test_*.py) half=$(mktemp)
    first=("${units[@]:0:${#units[@]}/2}") second=("${units[@]:${#units[@]}/2}")
    timeout 1800 .venv/bin/python -m pytest --durations=20 "${second[@]}" >"$half" 2>&1 &
    check unit-1 1800 .venv/bin/python -m pytest --durations=20 "${first[@]}"
    check unit-2 1800 tail --pid=$! --lines=+1 --follow "$half"
    wait $! || failed=1 results[-1]=${results[-1]/ok    /FAILED}
    rm "$half"
    check pytest 4200 .venv/bin/python -m pytest --durations=40 tests/parallel tests/integration
fi

printf '\n'
printf '%s\n' "${results[@]}"
exit "$failed"
