#!/bin/sh
# `make gpu`, and the same without make: sh tools/gpu.sh [arguments of benchmarks.gpu]
# Takes the vLLM of the current Python. If there is a packed vLLM in .gpu/part-00 (for a GPU machine without a
# network, see benchmarks/README.md), that one is unpacked into the folder SITE and used instead.
set -eu
cd "$(dirname "$0")/.."

if [ -e .gpu/part-00/unpack.sh ]; then
    SITE=${SITE:-$PWD/.cache/gpu}
    export SITE
    mkdir -p "$(dirname "$SITE")"
    sh .gpu/part-00/unpack.sh .gpu/part-00
    # Several parts travel one at a time; only with the last is anything unpacked.
    [ -e "$SITE.env" ] || { echo "make gpu: bring the other parts of .gpu to this machine first"; exit 1; }
    . "$SITE.env"
fi
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "make gpu: no $python here; PYTHON=… names another"; exit 1; }
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' 2>/dev/null \
    || { echo "make gpu: $python sees no GPU; \`make bench\` measures what a CPU can"; exit 1; }
"$python" -c 'import vllm' 2>/dev/null \
    || { echo "make gpu: $python has no vLLM: activate an environment that has (pip install 'cor-vllm[gpu]')"; exit 1; }

# vLLM finds the plugin by its entry point. If the package is not installed, a folder with its metadata
# stands for it: nothing is built or fetched, and the checkout itself is what runs.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c 'import importlib.metadata as m; m.version("cor-vllm")' 2>/dev/null; then
    metadata=$(mktemp -d)
    trap 'rm -rf "$metadata"' EXIT
    "$python" tools/metadata.py "$metadata"
    export PYTHONPATH="$PYTHONPATH:$metadata"
fi
# Not exec: the trap has to run. An interrupt reaches the program by itself.
trap : INT
# shellcheck disable=SC2086 - PARTS is a list of words
"$python" -m benchmarks.gpu ${LAYERS:+--layers "$LAYERS"} ${PARTS:+--parts $PARTS} "$@"
