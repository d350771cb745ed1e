"""The calibration benchmark runs and writes what it says; its times are nobody's business here."""

import csv
import itertools
import sys
from pathlib import Path

import pytest

from benchmarks import calibration
from benchmarks.common import results
from cor_vllm.calibrate.interventions.carrier import CHECKED
from cor_vllm.testing import tiny_models


def test_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_models.build("olmoe", tmp_path / "tiny-olmoe")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    arguments = ["--model", str(folder), "--tokens", "30", "60", "--seq-len", "16", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", ["calibration.py", *arguments, "--device", "cpu"])
    calibration.main()
    assert "tiny-olmoe" in capsys.readouterr().out
    (path,) = (tmp_path / "results").iterdir()
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["algorithm"], row["tokens"]) for row in rows] == [
        ("sweep", "30"), ("plain", "30"), ("sweep", "60"), ("plain", "60"),
    ]  # fmt: skip
    for row in rows:
        assert row["date"] and row["device"] and row["torch"] and row["repeats"] == "2"
        assert 0 < float(row["cpu_min_s"]) <= float(row["cpu_median_s"]) and float(row["load_average"]) >= 0
        assert 0 < float(row["min_s"]) <= float(row["median_s"]) <= float(row["max_s"])


def test_layer_rows_are_counted_where_they_happen() -> None:
    """Three layers, 2 sequences of 16: baseline forwards alone pass 3 · 32 rows."""
    from cor_vllm.calibrate.model.moe_model import MoeModel

    model = MoeModel(tiny_models.create("olmoe"))
    with calibration.counted_rows(model) as rows:
        calibration.baseline(model, [[1] * 16, [2] * 16])
    assert sum(rows) == 3 * 32


def test_the_law_is_recovered() -> None:
    shape = calibration.Shape("m", 1, 2, 1, 10, 16)
    timings = [
        calibration.Timing(shape, "sweep", 1, rows, [0.1, 99.0], [0.5 + 2e-6 * rows, 99.0])
        for rows in (10**5, 10**6, 10**7)
    ]
    assert calibration.law(timings) == "sweep: 0.50 s + 2.00 µs per layer-row, R² 1.000 over 3 shapes"


def test_the_powers_are_recovered() -> None:
    """Rows 3·M²·H, seconds M·√P, and N without effect; H and P vary apart."""
    cells = itertools.product((2, 4), (8, 16), (100, 400), (10, 30))
    timings = [
        calibration.Timing(
            calibration.Shape("random", layers, experts, 1, tokens, 16),
            "sweep", hard, 3 * layers**2 * hard, [99.0], [layers * tokens**0.5],
        )
        for layers, experts, tokens, hard in cells
    ]  # fmt: skip
    expected = {"rows": "M^(2.00 ± 0.00) N^(0.00 ± 0.00) P^(0.00 ± 0.00) H^(1.00 ± 0.00)",
                "seconds": "M^(1.00 ± 0.00) N^(0.00 ± 0.00) P^(0.50 ± 0.00) H^(0.00 ± 0.00)"}  # fmt: skip
    for quantity, powers in expected.items():
        found = calibration.power_law(timings, "sweep", quantity).replace("-0.00", "0.00")
        assert found == f"sweep {quantity} ~ {powers}, R² 1.000 over 16 shapes"
    assert calibration.power_law(timings[:2], "sweep", "rows") == "", "two shapes determine no law"


@pytest.mark.parametrize(("layers", "experts"), [(1, 8), (3, 8), (3, 16)])
def test_rows_of_the_sweep_follow_their_formula(layers: int, experts: int) -> None:
    """A row per token and layer, and from each layer on its own copies and variants; N has no part in it."""
    model = calibration.random_model(layers, experts)
    shape = calibration.Shape("random", layers, experts, 4, 60, 16)  # 4 sequences of 16 tokens: 64 rows
    (timing,) = calibration.measure(model, shape, ["sweep"], 1, {})
    forked = (64 + timing.hard * 4) * layers * (layers + 1) // 2
    assert timing.layer_rows == (64 + CHECKED) * layers + forked
