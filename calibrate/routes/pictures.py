"""Draws an analysis: regret against its null by group, by layer, and by the number of routes."""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cor_vllm.calibrate.result.plots import BLUE, GREY, ORANGE
from cor_vllm.calibrate.routes.groups import BINS
from cor_vllm.calibrate.routes.tables import Analysis, GroupTable, LayerTable, Measure

SIDES = (("realised", BLUE, "tokens of the text"), ("null", ORANGE, "tokens drawn from the model (null)"))


def draw_pictures(analysis: Analysis, folder: Path) -> list[Path]:
    """Draw all pictures into `folder`, each as PNG and SVG; the same analysis gives the same SVG bytes.

    Returns:
        The files written.
    """
    figures: dict[str, Callable[[Analysis], Figure]] = {
        "regret": regret_figure,
        "saturation": saturation_figure,
    }
    if len(analysis.layers) > 1:
        figures["layers"] = layers_figure
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "cor-vllm"}):
        for name, draw in figures.items():
            figure = draw(analysis)
            FigureCanvasAgg(figure)
            for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
                path = folder / f"{name}{suffix}"
                figure.savefig(path, dpi=150, metadata=metadata)
                written.append(path)
    return written


def regret_figure(analysis: Analysis) -> Figure:
    """Regret of realised and null tokens by group, and the difference, for the last layer and jointly."""
    shown = _shown(analysis)
    figure = Figure(figsize=(9, 3.4 * len(shown) + 1.2), layout="constrained")
    panels = figure.subplots(len(shown), 2, squeeze=False)
    for (left, right), layer in zip(panels, shown, strict=True):
        _regret_panel(left, layer)
        _excess_panel(right, layer)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(
        f"{analysis.model.name}: what the best of {analysis.options['routes']} sampled routes would gain"
    )
    return figure


def _shown(analysis: Analysis) -> list[LayerTable]:
    """The last layer, and all jointly if there are joint routes."""
    single = [layer for layer in analysis.layers if layer.layer is not None]
    return single[-1:] + [layer for layer in analysis.layers if layer.layer is None]


def _groups(layer: LayerTable) -> list[GroupTable]:
    return layer.groups[: len(BINS)]


def _bounds(group: GroupTable) -> str:
    if group.high >= 1:
        return f"{group.name}\np ≥ {group.low:g}"
    if group.low <= 0:
        return f"{group.name}\np < {group.high:g}"
    return f"{group.name}\n{group.low:g} ≤ p < {group.high:g}"


def _regret_panel(panel: Any, layer: LayerTable) -> None:
    groups = _groups(layer)
    for shift, (side, color, label) in zip((-0.2, 0.2), SIDES, strict=True):
        found = [group.measures["regret"] for group in groups]
        means = [getattr(measure, side) or 0.0 for measure in found]
        x = [i + shift for i in range(len(groups))]
        panel.bar(x, means, width=0.36, color=color, label=label)
        for at, measure in zip(x, found, strict=True):
            interval = getattr(measure, f"{side}_interval")
            if interval:
                panel.vlines(at, *interval, color="black", linewidth=1.2)
    panel.set_xticks(range(len(groups)), [_bounds(group) for group in groups])
    panel.set_ylabel("regret, nats per token")
    panel.set_xlabel("tokens by p, their probability under the standard route")
    panel.set_title(f"{layer.name}: best sampled route − standard route", fontsize=10)
    _from_zero(panel)


def _from_zero(panel: Any) -> None:
    highest = panel.dataLim.ymax  # 0 if there is only one route, not finite if there is no token
    panel.set_ylim(0, 1.1 * highest if isfinite(highest) and highest > 0 else 1)


def _excess_panel(panel: Any, layer: LayerTable) -> None:
    groups = _groups(layer)
    panel.axhline(0, color="black", linewidth=0.8)
    for i, group in enumerate(groups):
        _point(panel, i, group.measures["regret"])
    panel.set_xticks(range(len(groups)), [_bounds(group) for group in groups])
    panel.set_xlabel("mean and 95 % interval over documents")
    panel.set_xlim(-0.5, len(groups) - 0.5)
    panel.set_ylabel("excess: text − null, nats")
    panel.set_title(f"{layer.name}: beyond luck of the draw", fontsize=10)
    panel.margins(y=0.25)


def _point(panel: Any, x: float, measure: Measure) -> None:
    if measure.excess_interval:
        panel.vlines(x, *measure.excess_interval, color=BLUE, linewidth=1.5)
    if measure.excess is not None:
        color = BLUE if measure.excess_interval else GREY
        panel.plot([x], [measure.excess], "o", color=color, markersize=5)


def layers_figure(analysis: Analysis) -> Figure:
    """Regret by layer above, excess regret below, one column for each group."""
    layers = analysis.layers
    single = [layer for layer in layers if layer.layer is not None]
    figure = Figure(figsize=(4 * len(BINS), 5.5), layout="constrained")
    panels = figure.subplots(2, len(BINS), sharex=True)
    names = ["joint" if layer.layer is None else str(layer.layer) for layer in layers]
    for g in range(len(BINS)):
        upper, lower = panels[0][g], panels[1][g]
        found = [layer.groups[g].measures["regret"] for layer in layers]
        for side, color, label in SIDES:
            values = [getattr(measure, side) for measure in found]
            known = [value if value is not None else float("nan") for value in values]
            upper.plot(range(len(single)), known[: len(single)], "o-", color=color, markersize=4, label=label)
            upper.plot(range(len(single), len(layers)), known[len(single) :], "D", color=color)
        lower.axhline(0, color="black", linewidth=0.8)
        for i, measure in enumerate(found):
            _point(lower, i, measure)
        upper.set_title(_bounds(layers[0].groups[g]).replace("\n", ", "), fontsize=10)
        _from_zero(upper)
        step = -(-len(layers) // 12)
        lower.set_xticks(range(0, len(layers), step), names[::step])
        lower.set_xlabel("decoder layer")
        lower.set_xlim(-0.5, len(layers) - 0.5)
    panels[0][0].set_ylabel("regret, nats per token")
    panels[1][0].set_ylabel("excess: text − null, nats")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"{analysis.model.name}: best sampled route − standard route, by layer")
    return figure


def saturation_figure(analysis: Analysis) -> Figure:
    """Expected regret by the number of sampled routes, one panel for each group, for the last layer."""
    layer = analysis.layers[-1]
    figure = Figure(figsize=(4 * len(BINS), 3.8), layout="constrained")
    panels = figure.subplots(1, len(BINS))
    for panel, group in zip(panels, _groups(layer), strict=True):
        for side, (_, color, label) in enumerate(SIDES):
            values = [point[side] if point[side] is not None else float("nan") for point in group.saturation]
            panel.plot(analysis.draws, values, "o-", color=color, markersize=4, label=label)
        panel.set_xscale("log", base=2)
        panel.set_xticks(analysis.draws, list(map(str, analysis.draws)))
        panel.yaxis.set_major_locator(MaxNLocator(5))
        _from_zero(panel)
        panel.set_xlabel("sampled routes")
        panel.set_title(_bounds(group).replace("\n", ", "), fontsize=10)
    panels[0].set_ylabel("expected regret, nats per token")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(
        f"{analysis.model.name}, {layer.name}: the more routes are sampled, the better the best one looks"
    )
    return figure
