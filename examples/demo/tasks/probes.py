"""The demo's probes as data sets for lm-evaluation-harness, one per bucket."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

PROBES = Path(__file__).parent.parent / "probes.jsonl"


def _bucket(name: str) -> DatasetDict:
    with PROBES.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return DatasetDict({"test": Dataset.from_list([row for row in rows if row["bucket"] == name])})


# The harness calls these with what a task file has under `metadata`.
def head(**metadata: Any) -> DatasetDict:
    return _bucket("head")


def torso(**metadata: Any) -> DatasetDict:
    return _bucket("torso")


def tail(**metadata: Any) -> DatasetDict:
    return _bucket("tail")
