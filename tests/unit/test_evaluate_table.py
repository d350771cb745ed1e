"""Conditions, runs and the report, without a model."""

from pathlib import Path

import pytest

from cor_vllm.evaluate import runs
from cor_vllm.evaluate.benchmarks import Benchmark, EvaluationError, chosen
from cor_vllm.evaluate.comparisons import against_permuted, cells
from cor_vllm.evaluate.items import read_items
from cor_vllm.evaluate.pareto import _score, pareto
from cor_vllm.evaluate.report import render, silent, warnings
from cor_vllm.evaluate.runs import Column, Run
from cor_vllm.evaluate.tuning import halve, mean_score, parse_grid
from cor_vllm.evaluate.verdict import chat_note


def test_benchmarks_are_chosen_by_name_group_and_file(tmp_path: Path) -> None:
    mmlu = ["mmlu_humanities", "mmlu_social_sciences", "mmlu_stem", "mmlu_other"]
    assert [b.task for b in chosen(["general"])] == ["arc_challenge", "arc_easy", *mmlu, "gsm8k"]
    assert [b.task for b in chosen(["mmlu"])] == mmlu
    assert len(chosen(["factual", "truthfulqa_mc1"])) == 6
    with pytest.raises(EvaluationError, match="--tasks trivia: unknown"):
        chosen(["trivia"])
    with pytest.raises(EvaluationError, match="no such file"):
        chosen([str(tmp_path / "own.yaml")])


def sample(number: int, likelihoods: list[float], target: int = 0) -> dict:
    return {
        "doc_id": number,
        "doc": {},
        "filter": "none",
        "acc": float(max(range(len(likelihoods)), key=likelihoods.__getitem__) == target),
        "target": target,
        "filtered_resps": [(value, False) for value in likelihoods],
        "arguments": [("context", " word" * (i + 1)) for i in range(len(likelihoods))],
    }


def count_words(context: str, text: str) -> int:
    return len(text.split())


def test_margin_is_the_right_answer_less_the_wrong_ones() -> None:
    items = read_items(
        Benchmark("any", "acc"), {"any": [sample(4, [-3.0, -1.0, -2.0], target=1)]}, count_words
    )
    assert items == {"score": {"any/4": 1.0}, "gold": {"any/4": -1.0}, "margin": {"any/4": 1.5}}


def test_several_answers_may_be_right() -> None:
    doc = {"mc2_targets": {"labels": [1, 0, 1]}}
    rows = [{**sample(0, [-1.0, -5.0, -3.0]), "doc": doc}]
    rows.append({**sample(1, [-1.0, -2.0]), "doc": {"mc2_targets": {"labels": [1, 1]}}})
    items = read_items(Benchmark("truthfulqa_mc2", "acc"), {"truthfulqa_mc2": rows}, count_words)
    assert items["margin"] == {"truthfulqa_mc2/0": 3.0}, "an item without a wrong answer has none"


def test_factor_compares_means_per_token() -> None:
    # The sums prefer the first answer, the means the second, which is twice as long.
    rows = {"factor_news": [sample(0, [-3.0, -4.0])]}
    assert read_items(Benchmark("factor_news", "acc"), rows, count_words)["score"] == {"factor_news/0": 0.0}
    assert read_items(Benchmark("any", "acc"), {"any": [sample(0, [-3.0, -4.0])]}, count_words)["score"] == {
        "any/0": 1.0
    }


def test_only_the_filter_that_counts_is_read() -> None:
    rows = [{**sample(0, [-2.0, -1.0]), "filter": "other"}, sample(0, [-1.0, -2.0])]
    assert read_items(Benchmark("any", "acc", filter="other"), {"any": rows}, count_words)["score"] == {
        "any/0": 0.0
    }


def run(condition: str, values: list[float], **settings: object) -> Run:
    return Run(
        condition=condition,
        description=f"what {condition} is",
        key=runs.key_of({"condition": condition, **settings}),
        model="Qwen3-30B-A3B",
        backend="vllm",
        settings=dict(settings),
        versions={"cor-vllm": "0"},
        benchmarks={
            "triviaqa": Column(
                metric="exact_match",
                items={"score": {f"triviaqa/{i}": value for i, value in enumerate(values)}},
                tokens=100,
                seconds=2.0,
            )
        },
    )


def control_of(name: str, condition: str, values: list[float]) -> Run:
    return run(condition, values).model_copy(update={"control_of": name})


WORSE, BETTER = [0.0] * 60 + [1.0] * 40, [1.0] * 100
SHIFTED = [1.0] + [0.0] * 59 + [1.0] * 40


def test_the_report_says_what_is_noise_and_what_the_paper_has() -> None:
    text = render(
        [run("standard", WORSE), run("standard-again", WORSE), run("full", BETTER), run("layer", SHIFTED)]
    )
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "100.00 (**+60.00 [+50.00" in text and "paper 39.70" in text
    layer = next(line for line in text.splitlines() if line.startswith("| `layer` | 41"))
    assert "*noise*" in layer and layer.endswith("; paper 38.82 |")
    again = next(line for line in text.splitlines() if line.startswith("| `standard-again` | 40"))
    assert "paper" not in again
    assert rows["full"].endswith("| 50 |")  # tokens per second


def test_a_difference_within_the_repeats_own_is_noise() -> None:
    found = render([run("standard", WORSE), run("standard-again", BETTER), run("full", BETTER)])
    line = next(line for line in found.splitlines() if line.startswith("| `full` | 100"))
    assert "*noise*" in line


def test_p_is_corrected_for_the_number_of_conditions() -> None:
    rows = [run("standard", WORSE), run("standard-again", WORSE)]
    rows += [run(f"c{i}", [1.0] * 6 + [0.0] * 54 + [1.0] * 40) for i in range(10)]
    found = cells(rows, "score")["c0", "triviaqa"]
    assert found.found.p == pytest.approx(2 / 2**6)
    assert found.corrected == pytest.approx(min(1, 10 * 2 / 2**6))
    few = [0.0] * 50 + [1.0] * 50  # ten gained: p = 0.002, times ten more than 0.01
    rows += [run(f"d{i}", few) for i in range(10)]
    line = next(line for line in render(rows).splitlines() if line.startswith("| `d0` | 50"))
    assert "**" not in line and "*noise*" not in line


def test_a_condition_is_held_against_its_own_permutations() -> None:
    rows = [
        run("standard", WORSE),
        run("full", BETTER),
        control_of("full", "full-permuted", BETTER),
        run("expert@facts", BETTER),
        control_of("expert@facts", "expert-permuted-0@facts", WORSE),
        control_of("expert@facts", "expert-permuted-1@facts", BETTER),
        control_of("expert-swap0.05", "expert-swap0.05-permuted", WORSE),
    ]
    found = against_permuted(rows, "score")
    gain = sum(BETTER) / len(BETTER) - sum(WORSE) / len(WORSE)
    assert {name: each.cell.found.difference for (name, _), each in found.items()} == {
        "full": 0,
        "expert@facts": pytest.approx(gain / 2),
    }
    assert (found["expert@facts", "triviaqa"].above, found["full", "triviaqa"].above) == (1, 0)
    assert found["expert@facts", "triviaqa"].permutations == 2
    single = found["expert@facts", "triviaqa"].cell
    assert single.corrected == pytest.approx(min(1, 2 * single.found.p)), "two comparisons"
    assert "## Against permuted CEI" in render(rows)
    assert "## Against permuted CEI" not in render(rows[:2])


def test_without_a_reference_nothing_is_compared() -> None:
    assert "nothing to compare with" in render([run("full", BETTER)])


def test_the_picture_has_every_row_and_paired_intervals(tmp_path: Path) -> None:
    rows = [run("standard", [0.0, 1.0] * 20), run("expert", [1.0, 0.0] * 20), run("static-5", [1.0] * 40)]
    rows[-1].static = True
    rows += [control_of("expert", f"expert-permuted-{seed}", [0.0, 1.0] * 20) for seed in range(3)]
    assert pareto(rows, tmp_path) == [], "no row knows its activations"
    for row in rows:
        row.activations = 5.0 if row.condition == "static-5" else 4.0
    png, svg = pareto(rows, tmp_path)
    assert png.stat().st_size > 1000
    comments = svg.read_text()  # matplotlib draws text as paths and leaves the words in comments
    for word in ("standard", "static-5", "expert", "permuted CEI"):
        assert f"<!-- {word} -->" in comments
    scores = {str(i): float(i % 2) for i in range(40)}
    assert _score(scores, scores) == (50.0, 0.0, 0.0)
    tenths = dict.fromkeys("abc", 0.1)
    assert min(_score(tenths, None)) == 0, "rounding makes no negative bar"
    mean, below, above = _score(scores, None)
    assert mean == 50 and 10 < below < 20 and 10 < above < 20


def test_runs_go_on_and_refuse_others_of_the_same_name(tmp_path: Path) -> None:
    first = run("full", BETTER, limit=10)
    runs.save(tmp_path, first)
    assert runs.resumed(tmp_path, run("full", [], limit=10)) == first
    with pytest.raises(EvaluationError, match="another limit; give another --output"):
        runs.resumed(tmp_path, run("full", [], limit=20))
    runs.path_of(tmp_path, "full").write_text("{")
    with pytest.raises(EvaluationError, match="delete it"):
        runs.resumed(tmp_path, run("full", [], limit=10))


def test_a_benchmark_that_went_on_after_an_interruption_has_no_speed() -> None:
    resumed = run("full", BETTER)
    resumed.benchmarks["triviaqa"].seconds = None
    assert render([run("standard", WORSE), resumed]).splitlines()[-1].endswith("what full is |  |  |  |  |")


def test_halves_share_no_item_and_are_the_same_for_every_run() -> None:
    tuning, report = halve(run("full", BETTER), seed=0)
    other = halve(run("layer", SHIFTED), seed=0)
    items = [set(half.benchmarks["triviaqa"].items["score"]) for half in (tuning, report, *other)]
    assert items[0].isdisjoint(items[1]) and len(items[0]) == len(items[1]) == 50
    assert items[:2] == items[2:]
    assert mean_score(tuning) == 1.0


def column(scores: list[float], chance: float | None = None, cut: int = 0) -> Column:
    items = {f"t/{i}": value for i, value in enumerate(scores)}
    return Column(
        metric="m", items={"score": items}, tokens=1, seconds=1.0, chance=chance, max_model_len=64,
        cut=list(items)[:cut],
    )  # fmt: skip


def rows_of(*columns: Column) -> list[Run]:
    names = ["standard", "full", "layer", "expert"]
    return [
        run(name, []).model_copy(update={"benchmarks": {"t": each}})
        for name, each in zip(names, columns, strict=False)
    ]


ALTERNATING, QUARTER = [0.0, 1.0] * 50, [1.0, 0.0, 0.0, 0.0] * 25


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ([column([0.0] * 98 + [1.0] * 2), column([0.0] * 99 + [1.0])], "every row scores below 5%"),
        ([column([1.0] * 97 + [0.0] * 3), column([1.0] * 100)], "every row scores above 95%"),
        ([column(ALTERNATING, 0.5), column(ALTERNATING[::-1], 0.5)], "within its error of guessing (50%)"),
        ([column(QUARTER, 0.25), column([0.3] * 100, 0.25)], None),  # no error at all, and not 25 %
        ([column(ALTERNATING, 0.25), column(QUARTER, 0.25)], None),  # one row knows something
        ([column(QUARTER), column(QUARTER)], None),  # no choice: its guess is unknown
        ([column([0.0] * 100), column([0.0] * 90 + [1.0] * 10)], None),  # a row has left the floor
        # Both are below 5 %, but many items tell them apart all the same.
        ([column([0.0] * 1000), column([0.0] * 960 + [1.0] * 40)], None),
    ],
)
def test_a_benchmark_that_cannot_tell_says_so(columns: list[Column], said: str | None) -> None:
    rows = rows_of(*columns)
    text = render(rows)
    assert [said in line for line in warnings(rows, silent(rows))] == ([True] if said else [])
    assert ("*cannot tell* |" in text.replace(") |", " |")) is (said is not None)
    assert ("**Warning:** t: cannot tell a difference" in text) is (said is not None)


def test_prompts_that_were_cut_are_in_the_table() -> None:
    rows = rows_of(column(ALTERNATING, cut=3), column(ALTERNATING[::-1]))
    text = render(rows)
    assert "**Warning:** t: 3 of 100 items have a prompt that does not fit into 64 tokens" in text
    assert "| what standard is | 3 of 100, at 64 tokens |" in text and "| what full is | none |" in text
    halves = halve(rows[0], seed=0)
    assert sorted(item for half in halves for item in half.benchmarks["t"].cut) == ["t/0", "t/1", "t/2"]


class Template:
    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template


@pytest.mark.parametrize(
    ("model", "template", "noted"),
    [
        ("Qwen/Qwen3-30B-A3B", "…", True),
        ("org/Mixtral-8x7B-Instruct-v0.1", "…", True),
        ("Qwen/Qwen3-30B-A3B-Base", "…", False),
        ("org/based-on-this", "…", True),
        ("deepseek-ai/DeepSeek-V2-Lite", None, False),
    ],
)
def test_a_chat_model_that_is_asked_raw_is_noted(model: str, template: str | None, noted: bool) -> None:
    note = chat_note(model, Template(template))
    assert (note is not None) is noted
    if note:
        rows = rows_of(column(ALTERNATING), column(ALTERNATING))
        for each in rows:
            each.notes = [note]
        assert render(rows).count(note) == 1


@pytest.mark.parametrize("grid", ["", "0.1,", "a", "0.1;0.2", "-0.1", "0", "nan", "inf", "0.1,0.10"])
def test_a_grid_that_is_none(grid: str) -> None:
    with pytest.raises(EvaluationError, match="--grid"):
        parse_grid(grid)
    assert parse_grid("0.1, 1,1e-3") == [0.1, 1.0, 0.001]
