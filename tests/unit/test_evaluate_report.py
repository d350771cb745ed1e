"""`cor-vllm report`, the program behind docs/results.md."""

import csv
import lzma
from pathlib import Path

import pytest

from cor_vllm import cli
from cor_vllm.evaluate import runs

BASE = {"a": 0.0, "b": 1.0, "c": 0.0, "d": 1.0}


def run(condition: str, shift: float, **role: str) -> runs.Run:
    items = {
        "score": BASE if shift <= 1 else {**BASE, "a": 1.0},
        "gold": dict.fromkeys(BASE, -2.0 + shift),
        "margin": {item: value + shift for item, value in BASE.items()},
    }
    column = runs.Column(metric="acc", items=items, tokens=1, seconds=None)
    return runs.Run(
        condition=condition, description="", key="", model="m", backend="transformers", settings={},
        versions={}, benchmarks={"trivia": column}, **role,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [run("standard", 0.0)]
    for condition, shift in {"expert@answers0": 3.0, "expert@answers1": 2.5}.items():
        rows.append(run(condition, shift, draw_of="expert@answers"))
    for seed in range(4):
        role = {"control_of": "expert@answers0", "draw_of": "expert-permuted@answers"}
        rows.append(run(f"expert-permuted-{seed}@answers0", 0.25 * seed - 0.25, **role))
    for each in rows:
        runs.save(tmp_path, each)
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["report", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_packed_file_says_what_the_folder_says(folder, tmp_path, capsys):
    pack = tmp_path / "items.csv.xz"
    shown(capsys, folder, "--pack", pack)
    text = shown(capsys, pack)
    assert text == shown(capsys, folder)
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| `")]
    assert rows[:3] == ["`standard`", "`expert-permuted-0@answers0`", "`expert-permuted-1@answers0`"]
    assert "| `standard` | 50.00 | −2.00 | 0.50 |" in text
    high = "75.00 (+25.00 [+0.00, +75.00], p 1.000"
    assert f"| `expert@answers0` | {high}, corrected 1.000, *noise*) | 1.00 (+3.00 [+3.00, +3.00]" in text
    assert f"| `expert@answers, mean of 2` | {high}, *noise*) | 0.75 (+2.75 " in text
    same = "50.00 (+0.00 [+0.00, +0.00], p 1.000, *noise*)"
    assert f"| `expert-permuted@answers, mean of 4` | {same} | −1.88 (+0.12 " in text


def test_any_row_can_be_the_reference(folder, capsys):
    text = shown(capsys, folder, "--reference", "expert-permuted@answers, mean of 4")
    high = "75.00 (+25.00 [+0.00, +75.00], p 1.000, corrected 1.000, *noise*)"
    assert f"| `expert@answers1` | {high} | 0.50 (+2.38 [+2.38, +2.38]" in text


def test_draws_are_ranked_against_every_permutation(folder, capsys):
    text = shown(capsys, folder)
    # Both of two above all of four: 2 in 15, two-sided.
    assert "| trivia | margin | 2 | +2.75, +2.50 | 4 | +0.12, +0.50 | 0.1333 |" in text


def test_items_seen_elsewhere_can_be_left_out(folder, tmp_path, capsys):
    seen = tmp_path / "seen"
    seen.mkdir()
    one = run("standard", 0.0)
    one.benchmarks["trivia"].items = {"score": {"b": 1.0, "d": 1.0}}
    runs.save(seen, one)
    assert "| `standard` | 0.00 | −2.00 | 0.00 |" in shown(capsys, folder, "--without", seen)
    assert cli.main(["report", str(folder), "--without", str(folder)]) == 1
    assert "--without leaves no item" in capsys.readouterr().err


def test_draws_and_controls_can_be_chosen_by_name(folder, capsys):
    chosen = ["--draws", "expert@answers[0-9]", "--controls", "expert-permuted-[0-9]*"]
    ranked = "| trivia | margin | 2 | +2.75, +2.50 | 4 | +0.12, +0.50 | 0.1333 |"
    assert ranked in shown(capsys, folder, *chosen)
    fewer = shown(capsys, folder, *chosen[:3], "expert-permuted-[01]@*")
    assert "| trivia | margin | 2 | +2.75, +2.50 | 2 | −0.12, +0.00 | 0.3333 |" in fewer
    assert "No several draws" in shown(capsys, folder, "--draws", "standard")


def test_a_mean_is_no_comparison_that_the_others_are_corrected_for(folder, capsys):
    def cell_of(text: str) -> str:
        return next(line for line in text.splitlines() if line.startswith("| `expert@answers0` |"))

    before = cell_of(shown(capsys, folder))
    for path in folder.glob("*.json"):
        row = runs.load(path)
        runs.save(folder, row.model_copy(update={"draw_of": None}))
    text = shown(capsys, folder)
    assert ", mean of" not in text and cell_of(text) == before


def test_a_row_stands_against_its_own_permutations(folder, capsys):
    text = shown(capsys, folder).split("## Against permuted CEI")[1]
    line = next(line for line in text.splitlines() if line.startswith("| `expert@answers0` |"))
    assert line.count("above 4 of 4") == 3 and "+2.88 [+2.88, +2.88]" in line
    assert "`expert@answers1`" not in text


def test_random_routers_are_controls_of_the_router_alone(folder, capsys):
    before = shown(capsys, folder)
    runs.save(folder, run("router", 1.0))
    for seed in range(3):
        role = {"control_of": "router", "draw_of": "router-random"}
        runs.save(folder, run(f"router-random-{seed}", 0.5 * seed, **role))
    text = shown(capsys, folder)
    permuted, router = text.split("## Against permuted CEI")[1].split("## Against random routers")
    assert "`router" not in permuted and "| `expert@answers0` |" in permuted
    (line,) = (line for line in router.splitlines() if line.startswith("| `router` |"))
    assert line.count("+0.50 [+0.50, +0.50]") == 2 and line.count("above 2 of 3") == 2
    assert "| `router-random, mean of 3` | 50.00 (" in text
    assert before.split("## Draws against")[1] == text.split("## Draws against")[1]
    for path in folder.glob("expert*"):
        path.unlink()
    assert "permuted CEI" not in shown(capsys, folder).replace("table of permuted CEI", "")


def test_a_run_of_an_earlier_version_has_no_control(folder, capsys):
    for path in folder.glob("*.json"):
        lines = path.read_text().splitlines()
        earlier = [
            line for line in lines if not line.startswith((' "control_of"', ' "draw_of"', ' "static"'))
        ]
        assert len(earlier) == len(lines) - 3
        path.write_text("\n".join(earlier))
    text = shown(capsys, folder)
    assert "| `expert-permuted-0@answers0` | 50.00 (" in text
    assert "## Against permuted CEI" not in text and ", mean of" not in text


def test_a_packed_file_of_an_earlier_version_can_be_read(folder, tmp_path, capsys):
    pack, earlier = tmp_path / "items.csv.xz", tmp_path / "earlier.csv.xz"
    shown(capsys, folder, "--pack", pack)
    with lzma.open(pack, "rt", newline="") as lines, lzma.open(earlier, "wt", newline="") as out:
        writer = csv.DictWriter(
            out, ["condition", "benchmark", "quantity", "item", "value"], extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(csv.DictReader(lines))
    assert "| `expert@answers0` | 75.00 (+25.00" in shown(capsys, earlier)


def test_what_is_not_a_result_is_refused_in_one_line(folder, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        assert cli.main(["report", *map(str, arguments)]) == 1
        captured = capsys.readouterr()
        assert not captured.out and captured.err.count("\n") == 1
        return captured.err

    assert "missing: there is no such file or folder" in refused(tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no result of cor-vllm evaluate" in refused(empty)
    (empty / "package.json").write_text("{}")
    assert "package.json: not a result of this version" in refused(empty)
    foreign = tmp_path / "foreign.csv.xz"
    foreign.write_text("condition,benchmark")
    assert "foreign.csv.xz: not a file of cor-vllm report --pack" in refused(foreign)
    with lzma.open(foreign, "wt") as lines:
        lines.write("name,age\nAda,36\n")
    assert "foreign.csv.xz: not a file of cor-vllm report --pack (condition: Field required" in refused(
        foreign
    )
    assert "--reference exprt: no such row; there are expert-permuted-0@answers0" in refused(
        folder, "--reference", "exprt"
    )
    other = run("layer", 0.0)
    del other.benchmarks["trivia"].items["score"]["a"]
    runs.save(folder, other)
    assert "layer and standard do not hold the same items (1 are in one alone)" in refused(folder)
