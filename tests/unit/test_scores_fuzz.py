"""10,000 mutated scores files (fuzz.py)."""

import json

import pytest

from cor_vllm.scores import ScoresError, load
from tests.unit import fuzz
from tests.unit.test_scores import config, raw_bytes

SCORES = fuzz.Format(
    load,
    ScoresError,
    config,
    lambda values: raw_bytes(metadata={"format": "cor-scores/1", "config": json.dumps(values)}),
    ("model", "budget", "versions"),
)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_refused_or_read_back(tmp_path, seed):
    fuzz.check(SCORES, tmp_path / "scores.safetensors", seed)
