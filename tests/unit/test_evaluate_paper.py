"""The paper's numbers, the page that shows them, and its commands, each read by the program's own parser."""

import argparse
import dataclasses
import re
import shlex
from decimal import Decimal

import pytest

from benchmarks import ledger
from cor_vllm import cli
from cor_vllm.calibrate.config import CalibrationOptions
from cor_vllm.evaluate import paper
from cor_vllm.evaluate.benchmarks import BENCHMARKS, chosen
from cor_vllm.evaluate.command import _engine_arguments
from cor_vllm.evaluate.conditions import Sources, select, table
from cor_vllm.evaluate.paper import DEEPSEEK, GPT_OSS, MEANS, QWEN, TABLES, TELECHAT, Row, of
from cor_vllm.scores import Scores

TOP_K = {QWEN: 8, DEEPSEEK: 6, GPT_OSS: 4, TELECHAT: 4}
PAGE = ledger.PAGE.read_text()
SECTIONS = {part.split(":")[0].split("\n")[0]: part for part in PAGE.split("\n## ")}


def commands(text: str) -> list[list[str]]:
    """The lines of the code blocks that start with cor-vllm, as a shell splits them, without that word."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("cor-vllm ")]


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    """The program's own."""
    return cli.build_parser()


def name_of(model: str) -> str:
    """The paper's name of a hub id."""
    return next(name for name in TOP_K if name.lower() == model.split("/")[-1].lower())


def like(scores: Scores, model: str) -> Scores:
    """Scores that say the model's top_k, and experts enough for four more; nothing else is asked of them."""
    top_k = TOP_K[model]
    config = scores.config.model.model_copy(update={"top_k": top_k, "num_experts": 2 * top_k})
    cei = scores.cei.repeat(1, 2 * top_k)[:, : 2 * top_k]
    changed = scores.config.model_copy(update={"model": config})
    return dataclasses.replace(scores, cei=cei, config=changed)


def cells(args: argparse.Namespace, scores: Scores) -> set[tuple[str, str, str]]:
    """(model, condition, benchmark) that an `evaluate` command measures; refused where a name is unknown."""
    model = name_of(args.model)
    files = {"": args.cor_scores, **dict(args.also)}
    rows = table(Sources(dict.fromkeys(files, like(scores, model))), 0.1, args.permutations)
    found = select(rows, args.conditions.split(","))
    if args.backend != "transformers":
        assert not [row.name for row in found if row.transformers_only]
    tasks = [benchmark.task for benchmark in chosen(args.tasks.split(","))]
    return {(model, row.name, task) for row in found for task in tasks}


def test_the_page_has_the_numbers_of_the_program() -> None:
    assert ledger.updated(PAGE) == PAGE, "run python -m benchmarks.ledger"
    marks = set(re.findall(r"<!-- (?!end)(.+?) -->", PAGE))
    assert marks == {*(f"table {number}" for number in TABLES), "departures", "gains"}


def test_every_cell_is_a_benchmark_and_every_row_is_whole() -> None:
    for number, found in TABLES.items():
        assert set(found.columns) <= BENCHMARKS.keys() | MEANS.keys(), number
        for key, row in found.rows.items():
            assert len(row.cells) == len(found.columns), (number, key)
            assert all(0 < cell < 100 for cell in row.cells), (number, key)
    shape = {number: (len(found.rows), len(found.columns)) for number, found in TABLES.items()}
    assert shape == {1: (15, 6), 2: (4, 6), 3: (9, 7), 4: (4, 3), 6: (2, 4)}


def test_the_averages_are_the_means_of_their_cells_but_for_two_that_are_named() -> None:
    assert all(row.average is not None for number in (1, 2, 3) for row in TABLES[number].rows.values())
    assert [(*found[:4], str(found[4])) for found in ledger.departures()] == [
        (4, QWEN, "standard", "truthfulqa_mean", "42.67"),
        (4, QWEN, "dola", "truthfulqa_mean", "42.91"),
    ]


def test_a_wrong_cell_or_average_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    first = TABLES[1]
    key = (GPT_OSS, "iti")
    for change in (Row((34.45, 53.40, 20.10, 30.85, 34.59, 29.90), 33.94), Row(first.rows[key].cells, 33.93)):
        changed = dataclasses.replace(first, rows={**first.rows, key: change})
        monkeypatch.setitem(TABLES, 1, changed)
        assert (1, *key, "average") in {found[:4] for found in ledger.departures()}


def test_tables_that_share_a_cell_agree() -> None:
    seen: dict[tuple[str, str, str], float] = {}
    for found in TABLES.values():
        for (model, condition), row in found.rows.items():
            for column, cell in zip(found.columns, row.cells, strict=True):
                assert seen.setdefault((model, condition, column), cell) == cell


def test_the_gains_are_those_of_the_papers_text() -> None:
    factual = ledger.gains(1)
    assert round(ledger.mean(list(factual.values())), 1) == Decimal("3.1")
    assert list(factual) == [QWEN, DEEPSEEK, GPT_OSS]
    assert factual[QWEN] == Decimal("1.94") and ledger.gains(3)[GPT_OSS] == Decimal("-0.47")


@pytest.mark.parametrize("number", list(TABLES))
def test_every_cell_of_a_table_has_a_command_below_it(
    number: int, parser: argparse.ArgumentParser, scores: Scores
) -> None:
    found = [parser.parse_known_args(argv)[0] for argv in commands(SECTIONS[f"Table {number}"])]
    measured = {cell for args in found if hasattr(args, "tasks") for cell in cells(args, scores)}
    for model, condition in TABLES[number].rows:
        for column in TABLES[number].columns:
            for task in MEANS.get(column, (column,)):
                assert (model, condition, task) in measured


def test_figure_5_has_every_static_budget(parser: argparse.ArgumentParser, scores: Scores) -> None:
    (argv,) = commands(SECTIONS["Figure 5"])
    measured = cells(parser.parse_args(argv), scores)
    for condition in ("static-9", "static-10", "static-11", "static-12", "full"):
        assert {(QWEN, condition, task) for task in paper.TRUTHFULQA} <= measured


@pytest.mark.parametrize("argv", commands(PAGE), ids=lambda argv: " ".join(argv)[:60])
def test_every_command_is_one_that_the_program_takes(
    argv: list[str], parser: argparse.ArgumentParser, scores: Scores
) -> None:
    args, rest = parser.parse_known_args(argv)
    if argv[0] == "evaluate":
        assert cells(args, scores)
    if argv[0] in ("evaluate", "tune"):
        arguments = _engine_arguments(rest, args.model, args.seed, args.dtype)
        assert bool(rest) == bool(arguments), "flags of vLLM's engine"
        made = {output.split("/")[-1] for _, output in written(parser)}
        assert {str(args.cor_scores), *map(str, dict(getattr(args, "also", [])).values())} <= made
        assert len(chosen(args.tasks.split(","))) > 1
    else:
        assert not rest
    if argv[0] == "calibrate":
        options = calibration(args)
        assert (options.corpus, options.num_tokens, options.delta, options.epsilon) == ("c4", 1000, 0.1, 1e-6)
        assert (options.hard_percentile, options.easy_percentile) == (90, 10)


def calibration(args: argparse.Namespace) -> CalibrationOptions:
    names = CalibrationOptions.model_fields.keys() & vars(args).keys()
    return CalibrationOptions(**{name: getattr(args, name) for name in names})


def written(parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    """(model, file) of every calibration on the page."""
    found = [parser.parse_args(argv) for argv in commands(PAGE) if argv[0] == "calibrate"]
    return [(args.model, str(args.output)) for args in found]


def test_the_papers_settings_are_what_calibrate_does(parser: argparse.ArgumentParser, scores: Scores) -> None:
    assert "| `--cor-lambda 0.1`, the default" in PAGE and scores.config.serving.lambda_ == 0.1
    first = [parser.parse_args(argv) for argv in commands(SECTIONS["What is needed once"])]
    assert [name_of(args.model) for args in first] == [QWEN, DEEPSEEK, GPT_OSS]
    for args in first:
        options = calibration(args)
        assert (options.budget, options.intensity) == ("paper", "ratio")
    flags = re.findall(r"`(--[a-z0-9-]+ [^`]*)`", SECTIONS["What is needed once"])
    named = shlex.split(" ".join(flag for flag in flags if not flag.startswith("--cor-")))
    stated = calibration(parser.parse_args(["calibrate", "m", "--output", "o", *named]))
    assert stated == calibration(
        parser.parse_args(["calibrate", "m", "--output", "o", "--corpus", "c4", "--budget", "paper"])
    )


def test_the_numbers_of_a_model_are_found_by_its_name_alone() -> None:
    assert of("Qwen/Qwen3-30B-A3B", "random")["factor_wiki"] == 52.30
    assert of("/models/gpt-oss-20b/", "iti")["triviaqa"] == 29.90
    assert set(of(f"deepseek-ai/{DEEPSEEK}", "full")) == {*paper.FACTUAL, *paper.GENERAL}
    assert of(QWEN, "layer")["truthfulqa_gen"] == 41.42
    assert of(QWEN, "full-dola") == {"triviaqa": 39.92}, "a mean is no benchmark"
    assert of(TELECHAT, "full") == dict(
        zip((*paper.TRUTHFULQA, "triviaqa"), (36.58, 54.79, 42.71, 41.62), strict=True)
    )
    for other in ("Qwen/Qwen3-30B-A3B-Instruct-2507", "deepseek-ai/DeepSeek-V2-Lite-Chat", "demo", ""):
        assert of(other, "standard") == {}
    assert of(QWEN, "standard-again") == {}
