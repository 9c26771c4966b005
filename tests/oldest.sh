#!/usr/bin/env bash
# Runs tests with the oldest versions that setup.cfg allows: those of launch/oldest.lock, in a virtual
# environment of their own. They have no Horovod, so the tests are those of one process, where worlds
# are threads; ranks run with launch/requirements.lock. Takes 6 GB and about ten minutes.
#
#     PYTHON=python3.10 tests/oldest.sh [FOLDER OF THE ENVIRONMENT] [FURTHER OPTIONS OF pytest]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$(realpath -m "${1:-${TMPDIR:-/tmp}/hvdnoise-oldest}")

if [[ ! -e $venv/.done ]]; then
    rm -rf "$venv"
    "${PYTHON:-python3.10}" -m venv "$venv"
    "$venv/bin/pip" install -q -r "$root/launch/oldest.lock" 'setuptools<81' \
        hypothesis jsonschema psutil pytest pytest-timeout
    touch "$venv/.done"
fi
cd "$root"
PYTHONPATH=$root OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest -q -p no:cacheprovider -o testpaths= \
    -m 'not parallel and not slow' tests/unit/test_{export,noise,noise_config,plans,checkpoint,config,loop,models,optim,report,quadratic,study_parts,kronecker,clean_weights,data,datasets,records,steps,neighbours,per_example,laws,semantics}.py "${@:2}"
