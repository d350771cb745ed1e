"""`cor-vllm tune`: mode and λ chosen on one half of the items, reported on the other."""

import math
import random
from collections.abc import Sequence

from rich.console import Console

from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.evaluate.conditions import AGAIN, STANDARD, Condition
from cor_vllm.evaluate.options import EvaluateOptions
from cor_vllm.evaluate.pipeline import evaluate
from cor_vllm.evaluate.report import render, silent, warnings
from cor_vllm.evaluate.runs import Column, Run
from cor_vllm.evaluate.statistics import mean
from cor_vllm.modes import MODES, by_size


def grid_conditions(grid: Sequence[float]) -> list[Condition]:
    """What is tried: stock routing twice, and every mode that is not random, at each λ if it has one."""
    rows = [
        Condition(STANDARD, "the model's own routing, no plugin"),
        Condition(AGAIN, "the same once more: the noise of the measurement itself"),
    ]
    for name in by_size():
        mode = MODES[name]
        if mode.has_lambda:
            rows += [
                Condition(f"{name}-lambda{lam}", f"{name} at λ = {lam}", {"mode": name, "lambda": lam})
                for lam in grid
            ]
        elif not (mode.random or mode.is_stock):
            rows.append(Condition(name, mode.description, {"mode": name}))
    return rows


def parse_grid(text: str) -> list[float]:
    """λ separated by commas; EvaluationError if one is not a number above 0, or is there twice."""
    grid: list[float] = []
    for part in text.split(","):
        try:
            lam = float(part)
        except ValueError:
            lam = math.nan
        if not 0 < lam < math.inf:
            raise EvaluationError(f"--grid {text}: {part.strip()!r} is not a number above 0; like 0.05,0.1")
        if lam in grid:
            raise EvaluationError(f"--grid {text}: {lam} is there twice")
        grid.append(lam)
    return grid


def tune(options: EvaluateOptions, grid: Sequence[float], console: Console) -> str:
    """Run the grid, choose, and render the report.

    The winner has the highest score on the tuning half, averaged over benchmarks; the first of equals wins,
    so nothing displaces stock routing without beating it.

    Returns:
        Markdown.
    """
    rows = grid_conditions(grid)
    if options.limit == 1:
        raise EvaluationError("--limit 1: tune needs items to choose on and items to report on: 2 or more")
    runs = evaluate(options, console, rows)
    for name, column in runs[0].benchmarks.items():
        if len(column.items["score"]) < 2:
            raise EvaluationError(f"{name}: has one item, and tune needs two or more: take other --tasks")
    halves = [halve(run, options.seed) for run in runs]
    candidates = [tuning for tuning, _ in halves if tuning.condition != AGAIN]
    best = max(candidates, key=mean_score)
    shown = [report for _, report in halves if report.condition in (STANDARD, AGAIN, best.condition)]
    for line in warnings(shown, silent(shown)):
        console.print(f"warning: {line}", highlight=False, markup=False)
    lines = ["| condition | mean score on the tuning half, percent |", "| --- | --- |"]
    lines += [f"| {run.condition} | {mean_score(run) * 100:.2f} |" for run in candidates]
    flags = _flags(next(row for row in rows if row.name == best.condition))
    chosen = f"Chosen: **{best.condition}** (`{flags}`). On the other half, which took no part in the choice:"
    return (
        "\n\n".join([render(shown), "# The choice", "\n".join(lines), chosen + " the tables above."]) + "\n"
    )


def mean_score(run: Run) -> float:
    """Mean over benchmarks of the mean score, 0 to 1."""
    means = [mean(column.items["score"]) for column in run.benchmarks.values()]
    return sum(means) / len(means)


def halve(run: Run, seed: int) -> tuple[Run, Run]:
    """(tuning, reporting): a run split by item, the same way for every run of the same items."""
    sides: tuple[dict[str, Column], dict[str, Column]] = ({}, {})
    for name, column in run.benchmarks.items():
        items = sorted(column.items["score"])
        random.Random(seed).shuffle(items)
        tuning = set(items[: len(items) // 2])
        for i, side in enumerate(sides):
            kept = {
                quantity: {item: value for item, value in values.items() if (item in tuning) == (i == 0)}
                for quantity, values in column.items.items()
            }
            cut = [item for item in column.cut if (item in tuning) == (i == 0)]
            side[name] = column.model_copy(update={"items": kept, "cut": cut})
    first, second = (run.model_copy(update={"benchmarks": side}) for side in sides)
    return first, second


def _flags(condition: Condition) -> str:
    if condition.options is None:
        return "no --cor-scores"
    flags = {"mode": "--cor-mode", "lambda": "--cor-lambda"}
    return " ".join(f"{flags[name]} {value}" for name, value in condition.options.items())
