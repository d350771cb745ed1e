"""The shrinkage benchmark runs and writes what it says."""

import csv
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import shrink
from benchmarks.common import results
from cor_vllm.testing import tiny_models


def test_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_models.build("qwen3_moe", tmp_path / "tiny-qwen3")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    sizes = ["--draws", "2", "--tokens", "60", "--reference", "120", "--heldout", "40"]
    monkeypatch.setattr(sys, "argv", ["shrink.py", "--model", str(folder), *sizes, "--bfloat16"])
    shrink.main()
    assert "correlation_shrunk − correlation_raw" in capsys.readouterr().out
    (path,) = (tmp_path / "results").iterdir()
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["draw"] for row in rows] == ["0", "1"]
    for row in rows:
        assert row["date"] and row["device"] and row["corpus"] == "default"
        change = float(row["shrunk_minus_stock"]) - float(row["raw_minus_stock"])
        assert float(row["bfloat16_rank_correlation"]) > 0.5
        assert float(row["shrunk_minus_raw"]) == pytest.approx(change, abs=1e-9)


def test_correlations_ignore_what_routing_ignores() -> None:
    """A constant added to a layer changes nothing; ranks ignore any monotonic change besides."""
    cei = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    moved = cei + torch.tensor([[0.0], [5.0], [-2.0]])
    assert shrink.correlation(cei, moved) == pytest.approx(1)
    assert shrink.rank_correlation(cei, moved.exp()) == pytest.approx(1)
    assert shrink.rank_correlation(cei, -cei) == pytest.approx(-1)
