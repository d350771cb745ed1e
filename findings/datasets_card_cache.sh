#!/bin/sh
# datasets answers for one local folder with the rows of another, or of an earlier state, if it has a card.
#
# Versions:    datasets 5.2.0 (4.4.1 does the same), Python 3.11, Linux. It needs some 450 MB of disk.
# Input:       folders a/set and b/set with different rows, each with a README.md whose `configs` name the file
#              of the configuration `one`; and the same two folders without the README.md.
# Expectation: load_dataset of a folder returns what is in that folder. This holds without the card: another
#              folder, and a file that was changed, are read anew.
# Behaviour:   with the card, b/set returns the rows of a/set, and a/set still returns its first rows after
#              its file was changed. There is no warning. The cache knows such a folder by its last name and
#              the name of the configuration alone.
# Remedy:      a `cache_dir` of one's own for every folder, or download_mode="force_redownload".
# Output seen:
#     without a card: a first, b second, a after the change changed
#     with a card: a first, b first, a after the change first
# Date:        27 November 2026
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
cat >"$folder/look.py" <<'END'
import json
import sys
from pathlib import Path

from datasets import load_dataset

CARD = """---
configs:
- config_name: one
  data_files:
  - split: test
    path: rows.jsonl
---
"""


def look(root: Path, card: bool) -> list[str]:
    def write(name: str, text: str) -> None:
        folder = root / name / "set"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
        if card:
            (folder / "README.md").write_text(CARD)

    def read(name: str) -> str:
        (rows,) = load_dataset(str(root / name / "set"), "one" if card else None).values()
        return rows[0]["text"]

    write("a", "first")
    write("b", "second")
    seen = [read("a"), read("b")]
    write("a", "changed")
    return [*seen, read("a")]


root = Path(sys.argv[1])
bare, carded = look(root / "bare", card=False), look(root / "carded", card=True)
for title, seen in (("without a card", bare), ("with a card", carded)):
    print("{}: a {}, b {}, a after the change {}".format(title, *seen))
sys.exit(not (bare == ["first", "second", "changed"] and carded == ["first", "first", "first"]))
END
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2>"$folder/errors" ||
    { cat "$folder/errors"; echo "the behaviour has changed"; exit 1; }
