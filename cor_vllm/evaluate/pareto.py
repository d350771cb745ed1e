"""The paper's Figure 5: score against what a token costs, in experts and in time."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cor_vllm.evaluate.conditions import ROUTER, STANDARD
from cor_vllm.evaluate.runs import Column, Run
from cor_vllm.evaluate.statistics import interval, mean

Scores = Mapping[str, float]  # item → 0 to 1


def pareto(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw each benchmark's score against experts per token and against measured tokens per second.

    Bars: 95 % intervals of the difference to stock routing, item by item. Rows of equal cost stand side by
    side; those without activations (servers) are left out of the first axis. Permuted CEI and random
    routers: dashes.

    Args:
        runs: the table's rows.
        folder: where `pareto.png` and `pareto.svg` go.

    Returns:
        The files; none if fewer than two runs know their activations.
    """
    if sum(run.activations is not None for run in runs) < 2:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for run in runs for name in run.benchmarks))
    figure = Figure(figsize=(13, 3.8 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(names), 2, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        shown = [run for run in runs if name in run.benchmarks]
        for axis, cost in zip(row, COSTS, strict=True):
            _draw(axis, shown, name, cost)
        row[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7, frameon=False)
    files = [folder / f"pareto.{kind}" for kind in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files


COSTS: dict[str, Callable[[Run, Column], float | None]] = {
    "experts per token, all layers (equal ones side by side)": lambda run, column: run.activations,
    "tokens per second": lambda run, column: column.tokens / column.seconds if column.seconds else None,
}


def _draw(axis: Any, runs: Sequence[Run], name: str, cost: str) -> None:
    columns = [run.benchmarks[name] for run in runs]
    costs = [COSTS[cost](run, column) for run, column in zip(runs, columns, strict=True)]
    known = [x for x in costs if x is not None]
    step = 0.012 * (max(known) - min(known) or 1) if known else 0.0
    beside: dict[float, float] = {}  # cost → where the next point of this cost goes
    reference = next((run.benchmarks[name].items["score"] for run in runs if run.condition == STANDARD), None)
    styles = itertools.product("o^vDPX", [f"C{number}" for number in range(10)])
    line = []
    for run, column, x in zip(runs, columns, costs, strict=True):
        score, *bars = _score(column.items["score"], reference)
        if run.condition == STANDARD or run.static:
            if x is not None:
                line.append((x, score))
                axis.errorbar(x, score, _column(bars), fmt="s", color="0.4", capsize=2, linewidth=0.8)
                axis.annotate(
                    run.condition, (x, score), xytext=(4, -10), textcoords="offset points", fontsize=7
                )
        elif run.control_of is not None:
            kind, colour = ("random router", "0.4") if run.control_of == ROUTER else ("permuted CEI", "0.7")
            label = None if kind in axis.get_legend_handles_labels()[1] else kind
            axis.plot([] if x is None else [x], [] if x is None else [score], "_", color=colour, label=label)
        else:
            marker, colour = next(styles)
            style = {"fmt": marker, "color": colour, "capsize": 2, "linewidth": 0.8, "markersize": 5}
            if x is None:  # with a place in the legend all the same
                axis.errorbar([], [], label=run.condition, **style)
            else:
                beside[x] = beside.get(x, x) + step
                axis.errorbar(beside[x], score, _column(bars), label=run.condition, **style)
    if line:
        axis.plot(*zip(*sorted(line), strict=True), color="0.4", linewidth=1)
    axis.set(xlabel=cost, ylabel=f"{name}, percent")
    axis.margins(x=0.12)


def _column(bars: Sequence[float]) -> list[list[float]]:
    return [[bar] for bar in bars]


def _score(scores: Scores, reference: Scores | None) -> tuple[float, float, float]:
    """Mean, and the lengths below and above it of the difference's interval, percent."""
    base = reference or dict.fromkeys(scores, 0.0)
    changes = [score - base[item] for item, score in scores.items()]
    low, high = interval(changes)
    middle = sum(changes) / len(changes)
    # Rounding can put the mean of equal changes outside their interval, which matplotlib refuses.
    return 100 * mean(scores), max(0.0, 100 * (middle - low)), max(0.0, 100 * (high - middle))
