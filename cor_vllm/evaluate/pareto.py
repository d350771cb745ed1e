"""The paper's Figure 5: score against what a token costs, in experts and in time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cor_vllm.evaluate.runs import Column, Run
from cor_vllm.evaluate.statistics import interval


def pareto(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw each benchmark's score against experts per token and against measured tokens per second.

    Rows without activations (servers) are left out of the first axis.

    Args:
        runs: the table's rows.
        folder: where `pareto.png` and `pareto.svg` go.

    Returns:
        The files; none where fewer than two runs know their activations.
    """
    if sum(run.activations is not None for run in runs) < 2:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for run in runs for name in run.benchmarks))
    figure = Figure(figsize=(11, 3.6 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(names), 2, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        for axis, label in zip(row, ("experts per token, all layers", "tokens per second"), strict=True):
            _draw(axis, [run for run in runs if name in run.benchmarks], name, label)
    files = [folder / f"pareto.{kind}" for kind in ("png", "svg")]
    for file in files:
        figure.savefig(file, dpi=150)
    return files


def _draw(axis: Any, runs: Sequence[Run], name: str, label: str) -> None:
    static = []
    for run in runs:
        column = run.benchmarks[name]
        speed = column.tokens / column.seconds if column.seconds else None
        x = run.activations if label.startswith("experts") else speed
        if x is None:
            continue
        mean, low, high = _score(column)
        is_static = run.condition in ("standard", "off") or run.condition.startswith("static")
        axis.errorbar(x, mean, [[mean - low], [high - mean]], fmt="s" if is_static else "o", capsize=3,
                      color="tab:grey" if is_static else "tab:blue")  # fmt: skip
        axis.annotate(run.condition, (x, mean), xytext=(5, 4), textcoords="offset points", fontsize=7)
        if is_static:
            static.append((x, mean))
    if static:
        axis.plot(*zip(*sorted(static), strict=True), color="tab:grey", linewidth=1)
    axis.set(xlabel=label, ylabel=f"{name}, percent")


def _score(column: Column) -> tuple[float, float, float]:
    values = list(column.items["score"].values())
    low, high = interval(values)
    return 100 * sum(values) / len(values), 100 * low, 100 * high
