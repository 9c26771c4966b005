#!/usr/bin/env bash
# Makes a table of this folder again, with everything behind it:
#
#     docs/results/make.sh NAME [FLAG]...       NAME: a .yaml here without its ending, or lag
#
# The flags go to `hvdnoise study`, or to lag.py. A study can be stopped at any time; the same command
# goes on. Its runs and its page stay in studies/NAME.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

name=${1-}
if [[ $name == lag ]]; then
    exec .venv/bin/python docs/results/lag.py --out docs/results/lag "${@:2}"
elif [[ ! -f docs/results/$name.yaml ]]; then
    studies=(docs/results/*.yaml)
    studies=("${studies[@]#docs/results/}")
    echo "make.sh: '$name' is no table: give lag or one of ${studies[*]%.yaml}" >&2
    exit 2
fi
.venv/bin/hvdnoise study "docs/results/$name.yaml" "${@:2}"
[[ " $* " != *" --dry_run"* ]] || exit 0
.venv/bin/hvdnoise report "studies/$name"
mkdir -p "docs/results/$name"
cp "studies/$name"/{table.md,table.csv,report/runs.csv,report/figures/cost.svg} "docs/results/$name/"
if [[ $name == mlp-noisy ]]; then # the figure of README.md
    .venv/bin/python -c 'from hvdnoise.report import cost_figure
cost_figure("studies/mlp-noisy", "docs/results/mlp-noisy/headline.svg", methods=[
    "plain-small", "plain", "gnc-own", "gnc-isotropic", "cov-full", "sam", "echo-gnc"])'
fi
