"""`cor-vllm plot`: draws the paper's Figures 4 and 6, and the coverage, as PNG and SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.result.show import DORMANT_CEI, dormant, even_share
from cor_vllm.scores import Scores

PANELS = 4  # layers in the CEI figure if none are chosen
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#666666"  # colour-blind people can tell them apart, too


def plot(scores: Scores, folder: Path, layers: Sequence[int] | None = None) -> list[Path]:
    """Draw all figures into `folder`, which is created.

    Args:
        scores: what to draw.
        folder: receives budget, cei and coverage, each as .png and .svg.
        layers: decoder layer numbers for the CEI figure; if None, those with the most dormant experts.

    Returns:
        The files written.

    Raises:
        CalibrationError: a chosen layer is not a MoE layer.
    """
    rows = _rows(scores, layers)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "budget": budget_figure(scores),
        "cei": cei_figure(scores, rows),
        "coverage": coverage_figure(scores),
    }
    written = []
    # Without salt and date the same scores give the same SVG bytes.
    with matplotlib.rc_context({"svg.hashsalt": "cor-vllm"}):
        for name, figure in figures.items():
            FigureCanvasAgg(figure)
            for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
                path = folder / f"{name}{suffix}"
                figure.savefig(path, dpi=150, metadata=metadata)
                written.append(path)
    return written


def _rows(scores: Scores, layers: Sequence[int] | None) -> list[int]:
    index = scores.layer_index.tolist()
    if layers is None:
        counts = dormant(scores).sum(dim=1).tolist()
        most = sorted(range(len(index)), key=lambda m: (-counts[m], m))[:PANELS]
        return sorted(most)
    for layer in layers:
        if layer not in index:
            raise CalibrationError(f"--layers {layer}: not a MoE layer of this file, which has {index}")
    return [index.index(layer) for layer in layers]


def budget_figure(scores: Scores) -> Figure:
    """R_l with its bootstrap interval above, k_l below, by decoder layer (Figure 4)."""
    figure = Figure(figsize=(max(6.0, 2 + 0.2 * scores.num_layers), 5.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    x, rki = scores.layer_index.tolist(), scores.rki.tolist()
    intervals = scores.config.calibration.rki_interval
    if intervals:
        upper.vlines(
            x, *zip(*intervals, strict=True), color=GREY, linewidth=1, label="95 % bootstrap interval"
        )
    upper.plot(x, rki, "o", color=BLUE, markersize=4, label="R_l")
    # Ratios over a near-zero loss change span many decades, and both signs.
    upper.set_yscale("symlog", linthresh=1)
    upper.axhline(0, color="black", linewidth=0.8)
    upper.set_ylabel("relative knowledge intensity R_l")
    upper.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    top_k = scores.config.model.top_k
    lower.bar(x, scores.k.tolist(), color=BLUE, width=0.8)
    lower.axhline(top_k, color=ORANGE, linestyle="--", label=f"the model's own top_k = {top_k}")
    lower.set_ylim(0, max(int(scores.k.max()), top_k) * 1.3)
    lower.legend(frameon=False, loc="upper right")
    lower.set_ylabel("experts per token k_l")
    lower.set_xlabel("decoder layer")
    for axis in (lower.xaxis, lower.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"{scores.config.model.name}: budget by layer")
    return figure


def cei_figure(scores: Scores, rows: Sequence[int]) -> Figure:
    """Draw CEI against mean router probability, one panel for each layer, dormant zone shaded (Figure 6)."""
    columns = min(len(rows), 2)
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(4.5 * columns + 1, 3.8 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(rows) :]:
        panel.set_visible(False)
    for panel, m in zip(panels, rows, strict=False):
        _cei_panel(panel, scores, m)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{scores.config.model.name}: causal impact against routing")
    return figure


def _cei_panel(panel: Any, scores: Scores, m: int) -> None:
    # Probabilities span decades in a layer of many experts; an exact 0 has no place on a log axis.
    prob, cei, raw = scores.router_prob[m].clamp(min=1e-6), scores.cei[m], scores.cei_raw[m]
    left = prob.min().item() / 1.5
    seen = scores.cei_count[m] > 0
    share = even_share(scores)[m].item()
    panel.fill_between([left, share], DORMANT_CEI, 1.05, color=ORANGE, alpha=0.12, linewidth=0,
                       label="dormant zone")  # fmt: skip
    for chosen, marker, color, label in (
        (seen & (raw > 0), "o", BLUE, "removal hurts (CEI > 0)"),
        (seen & (raw <= 0), "x", ORANGE, "removal does not hurt"),
        (~seen, ".", GREY, "never active"),
    ):
        panel.scatter(prob[chosen], cei[chosen], marker=marker, color=color, s=24, linewidth=1.2, label=label)
    count = int(dormant(scores)[m].sum())
    panel.set_title(f"layer {scores.layer_index[m].item()}: {count} dormant", fontsize=10)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlim(left, 1.5 * max(prob.max().item(), share))
    panel.set_ylim(-0.05, 1.05)
    panel.set_xlabel("mean router probability on hard positions")
    panel.set_ylabel("CEI, normalised in the layer")


def coverage_figure(scores: Scores) -> Figure:
    """Draw how many hard positions each expert's CEI comes from; experts are sorted within each layer."""
    figure = Figure(figsize=(7.5, max(2.8, 1.8 + 0.14 * scores.num_layers)), layout="constrained")
    axes = figure.subplots()
    counts = scores.cei_count.sort(dim=1, descending=True).values
    image = axes.imshow(counts, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    figure.colorbar(image, ax=axes, label="hard positions")
    step = -(-scores.num_layers // 24)
    ticks = list(range(0, scores.num_layers, step))
    axes.set_yticks(ticks, [str(scores.layer_index[m].item()) for m in ticks])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("expert rank within the layer, by coverage")
    axes.set_ylabel("decoder layer")
    never = int((scores.cei_count == 0).sum())
    title = f"{scores.config.model.name}: coverage; {never} of {counts.numel()} experts never active"
    rank = scores.config.calibration.cei_split_half_rank
    if rank is not None:
        title += f"\nrank correlation of CEI from two halves of the hard positions: {rank:.2f}"
    axes.set_title(title)
    return figure
