#!/bin/sh
# safetensors writes the same tensors with the same metadata as different bytes, also within one process.
#
# Versions:    safetensors 0.8.0, numpy 2.4.2, Python 3.11, Linux. It needs some 100 MB of disk.
# Input:       one tensor and eight strings of metadata, saved 20 times.
# Expectation: the same bytes each time, as without metadata: the tensors of a header are sorted.
# Behaviour:   the keys of `__metadata__` come in another order each time, so that a checksum of the file says
#              nothing about its content. (With one key, or none, the bytes are always the same.)
# Also reported in public: safetensors' issue 584.
# Remedy:      one key that holds all of it as JSON, or sort the header after saving.
# Output seen (the last number may be lower: eight keys can come in the same order twice):
#     different files of 20: without metadata 1, one key 1, eight keys 20
# Date:        27 November 2026
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.2
cat >"$folder/look.py" <<'END'
import sys

import numpy as np
from safetensors.numpy import save

tensors = {"a": np.zeros(2, np.float32), "b": np.ones(2, np.float32)}
texts = [None, {"0": "text"}, {str(number): "text" for number in range(8)}]
different = [len({save(tensors, metadata) for _ in range(20)}) for metadata in texts]
print("different files of 20: without metadata {}, one key {}, eight keys {}".format(*different))
sys.exit(not (different[:2] == [1, 1] and different[2] > 1))
END
"$folder/venv/bin/python" "$folder/look.py" || { echo "the behaviour has changed"; exit 1; }
