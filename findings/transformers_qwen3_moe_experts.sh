#!/bin/sh
# A Qwen3-MoE configuration that transformers 5 saves has another number of experts for transformers 4.
#
# Versions:    transformers 5.24.0 and 4.57.6, Python 3.11, Linux. It needs some 600 MB of disk and no torch.
# Input:       a config.json of a Qwen3-MoE model with "num_experts": 16, as published models of the family say.
# Expectation: from_pretrained and save_pretrained of version 5 keep the key, as they do for Qwen2-MoE, or
#              version 4 refuses the file.
# Behaviour:   version 5 writes "num_local_experts": 16 and no "num_experts". Version 5 reads that back as 16.
#              Version 4 takes its default, 128, without a word; so does any reader that looks for the key of
#              the published files.
# Remedy:      rename the key after save_pretrained.
# Output seen:
#     qwen3_moe written by 5.24.0: num_local_experts 16
#     qwen2_moe written by 5.24.0: num_experts 16
#     qwen3_moe read by 5.24.0: 16
#     qwen3_moe read by 4.57.6: 128
# Date:        27 November 2026
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM
for version in 5.24.0 4.57.6; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check transformers==$version
done
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1
cat >"$folder/write.py" <<'END'
import json
import sys
from pathlib import Path

from transformers import AutoConfig

for family in ("qwen3_moe", "qwen2_moe"):
    folder = Path(sys.argv[1]) / family
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": family, "num_experts": 16}))
    AutoConfig.from_pretrained(folder).save_pretrained(folder / "saved")
    saved = json.loads((folder / "saved" / "config.json").read_text())
    names = [name for name in ("num_experts", "num_local_experts") if name in saved]
    print(f"{family} written by 5.24.0:", *(f"{name} {saved[name]}" for name in names))
END
cat >"$folder/read.py" <<'END'
import sys

import transformers

config = transformers.AutoConfig.from_pretrained(f"{sys.argv[1]}/qwen3_moe/saved")
print(f"qwen3_moe read by {transformers.__version__}: {config.num_experts}")
END
{
    "$folder/5.24.0/bin/python" "$folder/write.py" "$folder"
    "$folder/5.24.0/bin/python" "$folder/read.py" "$folder"
    "$folder/4.57.6/bin/python" "$folder/read.py" "$folder"
} >"$folder/seen" 2>"$folder/errors" || { cat "$folder/seen" "$folder/errors"; exit 1; }
cat "$folder/seen"
cat >"$folder/expected" <<END
qwen3_moe written by 5.24.0: num_local_experts 16
qwen2_moe written by 5.24.0: num_experts 16
qwen3_moe read by 5.24.0: 16
qwen3_moe read by 4.57.6: 128
END
cmp -s "$folder/seen" "$folder/expected" || { echo "the behaviour has changed"; exit 1; }
