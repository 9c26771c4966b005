#!/usr/bin/env bash
# From a fresh clone to a trained network: sets up .venv where that is still to
# be done, then trains on two ranks by launch/quickstart.yaml. Further options
# go to the trainer, for instance: launch/quickstart.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

launch/setup.sh

# Debian and Ubuntu package Fashion-MNIST. Elsewhere the trainer downloads it.
if [[ ! -d /usr/share/datasets/fashion-mnist && ! -d data/FashionMNIST && $EUID == 0 ]] &&
    command -v apt-get >/dev/null; then
    echo "getting the package dataset-fashion-mnist"
    get=(env DEBIAN_FRONTEND=noninteractive timeout 120 apt-get -qq -o DPkg::Lock::Timeout=60)
    { "${get[@]}" install -y dataset-fashion-mnist ||
        { "${get[@]}" update && "${get[@]}" install -y dataset-fashion-mnist; }; } </dev/null >/dev/null 2>&1 ||
        echo "that package is not to be had here: the trainer downloads the images"
fi

# Two ranks share the cores of this machine.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 3 ? cores / 2 : 1))}

exec .venv/bin/horovodrun --gloo --network-interface lo -np 2 \
    .venv/bin/hvdnoise train --config launch/quickstart.yaml "$@"
