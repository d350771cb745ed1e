#!/bin/sh
# transformers gives a tokenizer without a vocabulary for a folder that has no tokenizer files.
#
# Versions:    transformers 5.24.0 (5.19.0 does the same), Python 3.11, Linux. It needs some 200 MB of disk, and
#              no torch.
# Input:       a folder with the configuration of a Qwen3-MoE model in config.json, and no other file, as it is
#              left by a download of config and weights alone.
# Expectation: AutoTokenizer.from_pretrained raises an error, as it does for a
#              folder without config.json.
# Behaviour:   it returns a tokenizer of the model's class that knows one token, and every text is an empty
#              list of ids. What is done with these ids fails later, or not at all.
# Remedy:      ask the tokenizer for a text's ids, and take none for an error.
# Output seen:
#     without config.json: ValueError
#     with config.json: Qwen2Tokenizer of 1, "A text." is []
# Date:        27 November 2026
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1
cat >"$folder/look.py" <<'END'
import sys
from pathlib import Path

from transformers import AutoTokenizer, Qwen3MoeConfig

folder = Path(sys.argv[1]) / "model"
folder.mkdir()
try:
    AutoTokenizer.from_pretrained(folder)
    bare = "no error"
except (OSError, ValueError) as error:
    bare = type(error).__name__
print(f"without config.json: {bare}")
Qwen3MoeConfig(num_hidden_layers=1).save_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("A text.").input_ids
print(f'with config.json: {type(tokenizer).__name__} of {len(tokenizer)}, "A text." is {ids}')
sys.exit(not (bare != "no error" and ids == []))
END
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2>"$folder/errors" ||
    { cat "$folder/errors"; echo "the behaviour has changed"; exit 1; }
