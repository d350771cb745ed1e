"""The program behind docs/results.md."""

from pathlib import Path

import pytest

from benchmarks import evaluation
from cor_vllm.evaluate import runs

BASE = {"a": 0.0, "b": 1.0, "c": 0.0, "d": 1.0}


def run(condition: str, shift: float) -> runs.Run:
    items = {
        "score": BASE if shift <= 1 else {**BASE, "a": 1.0},
        "gold": dict.fromkeys(BASE, -2.0 + shift),
        "margin": {item: value + shift for item, value in BASE.items()},
    }
    column = runs.Column(metric="acc", items=items, tokens=1, seconds=None)
    return runs.Run(
        condition=condition, description="", key="", model="m", backend="transformers", settings={},
        versions={}, benchmarks={"trivia": column},
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shifts = {"standard": 0.0, "expert@answers0": 3.0, "expert@answers1": 2.5}
    shifts |= {f"expert-permuted-{seed}@answers0": 0.25 * seed - 0.25 for seed in range(4)}
    for condition, shift in shifts.items():
        runs.save(tmp_path, run(condition, shift))
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr("sys.argv", ["evaluation", *map(str, arguments)])
    evaluation.main()
    return capsys.readouterr().out


def test_a_packed_file_says_what_the_folder_says(folder, tmp_path, capsys, monkeypatch):
    pack = tmp_path / "items.csv.xz"
    shown(capsys, monkeypatch, folder, "--pack", pack)
    text = shown(capsys, monkeypatch, pack)
    assert text == shown(capsys, monkeypatch, folder)
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| `")]
    assert rows[:3] == ["`standard`", "`expert-permuted-0@answers0`", "`expert-permuted-1@answers0`"]
    assert "| `standard` | 50.00 | −2.00 | 0.50 |" in text
    assert "| `expert@answers0` | +25.00 [+0.00, +75.00], p 1.000 | +3.00 [+3.00, +3.00]" in text
    assert "| `expert@answers, mean of 2` | +25.00 [+0.00, +75.00], p 1.000 | +2.75 " in text
    assert "| `expert-permuted@answers, mean of 4` | +0.00 [+0.00, +0.00], p 1.000 | +0.12 " in text


def test_any_row_can_be_the_reference(folder, capsys, monkeypatch):
    text = shown(capsys, monkeypatch, folder, "--reference", "expert-permuted@answers, mean of 4")
    assert "| `expert@answers1` | +25.00 [+0.00, +75.00], p 1.000 | +2.38 [+2.38, +2.38]" in text


def test_draws_are_ranked_against_every_permutation(folder, capsys, monkeypatch):
    text = shown(capsys, monkeypatch, folder)
    # Both of two above all of four: 2 in 15, two-sided.
    assert "| trivia | margin | 2 | +2.75, +2.50 | 4 | +0.12, +0.50 | 0.1333 |" in text


def test_items_seen_elsewhere_can_be_left_out(folder, tmp_path, capsys, monkeypatch):
    seen = tmp_path / "seen"
    seen.mkdir()
    one = run("standard", 0.0)
    one.benchmarks["trivia"].items = {"score": {"b": 1.0, "d": 1.0}}
    runs.save(seen, one)
    assert "| `standard` | 0.00 | −2.00 | 0.00 |" in shown(capsys, monkeypatch, folder, "--without", seen)
