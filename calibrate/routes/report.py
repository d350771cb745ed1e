"""Prints an analysis: excess regret first, and in words what it means."""

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cor_vllm.calibrate.routes.bootstrap import Interval
from cor_vllm.calibrate.routes.groups import ALL, BINS
from cor_vllm.calibrate.routes.tables import Analysis, GroupTable, LayerTable

SIGNIFICANT = 0.05
# What the second table shows: the name of the measure, and what a reader sees.
DETAILS = {
    "best_alternative": "best other route",
    "gap": "probability gap",
    "any_better": "any better route",
    "rank_share": "better routes",
    "tie_share": "equal routes",
    "top_1": "standard is best",
    "top_4": "standard in top 4",
    "top_8": "standard in top 8",
    "top_16": "standard in top 16",
    "mean_change": "mean route",
    "correlation": "score with utility",
}


def print_analysis(analysis: Analysis, console: Console) -> None:
    """Print a header, the table of regret, sentences, the further measures of the last layer, and notes."""
    model, text, options = analysis.model, analysis.text, analysis.options
    console.print(
        f"{model.name} ({model.architecture}), {model.dtype}: {options['routes']} sampled routes of "
        f"{model.top_k} of {model.num_experts} experts a token\n"
        f"{text.name}: tokens compared {text.scored}, documents {text.documents}",
        highlight=False,
    )
    console.print(_regret_table(analysis))
    for line in findings(analysis):
        console.print(line, highlight=False, style="bold")
    console.print(_details_table(analysis.layers[-1]))
    divergence = _divergence(analysis.layers[-1])
    if divergence:
        console.print(divergence, highlight=False)
    for note in analysis.notes:
        console.print(f"note: {note}", style="yellow", highlight=False)


def _regret_table(analysis: Analysis) -> Table:
    table = Table(
        "layer", "tokens", "text", "null", "excess", "95 % interval", "p",
        title="Regret, nats per token: the best sampled route minus the standard one",
        caption="p: of an excess by accident, corrected for all layers and groups (Holm)",
        box=SIMPLE,
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for layer in analysis.layers:
        for group in layer.groups:
            if group.name not in (*BINS, ALL):
                continue
            regret = group.measures["regret"]
            table.add_row(
                "joint" if layer.layer is None else str(layer.layer),
                group.name,
                _number(regret.realised),
                _number(regret.null),
                _number(regret.excess, "+"),
                _interval(regret.excess_interval),
                "" if group.name == ALL else _number(regret.p_holm, digits=3),
            )
    return table


def findings(analysis: Analysis) -> list[str]:
    """What the excess regret means, in one sentence for all layers of which the same can be said."""
    layers: dict[str, list[str]] = {}
    for layer in analysis.layers:
        layers.setdefault(_finding(layer, analysis.options["routes"]), []).append(layer.name)
    return [f"{', '.join(names)}: {finding}" for finding, names in layers.items()]


def _finding(layer: LayerTable, routes: int) -> str:
    groups = layer.groups[: len(BINS)]
    if all(group.measures["regret"].excess_interval is None for group in groups):
        return "n/a, too few documents in every group to tell regret from luck of the draw"
    more = [group.name for group in groups if _beyond(group) > 0]
    less = [group.name for group in groups if _beyond(group) < 0]
    if not more and not less:
        return (
            f"no excess beyond its noise in any group: the best of {routes} sampled routes looks better by "
            "luck of the draw alone"
        )
    parts = []
    if more:
        parts.append(
            f"on {_and(more)} tokens other routes would have served the text better than luck of the draw "
            "explains"
        )
    if less:
        parts.append(
            f"on {_and(less)} tokens the best sampled route gains less than it does by luck of the draw, so "
            "the standard route is better for this text than for the model's own draws"
        )
    return "; ".join(parts)


def _beyond(group: GroupTable) -> int:
    """1 or −1 if the excess is above or below 0 by more than its noise and the number of looks; else 0."""
    regret = group.measures["regret"]
    if regret.excess is None or regret.p_holm is None or regret.p_holm >= SIGNIFICANT:
        return 0
    return 1 if regret.excess > 0 else -1


def _and(names: list[str]) -> str:
    return " and ".join(names)


def _details_table(layer: LayerTable) -> Table:
    groups = layer.groups[: len(BINS)]
    names = [group.name for group in groups]
    table = Table(
        "", *names, title=f"{layer.name}: text / null, means over tokens", box=SIMPLE, pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    table.add_row("share of tokens", *(f"{group.share[0]:.3f} / {group.share[1]:.3f}" for group in groups))
    for name, label in DETAILS.items():
        found = [group.measures[name] for group in groups]
        pairs = [f"{_number(measure.realised)} / {_number(measure.null)}" for measure in found]
        table.add_row(label, *pairs)
    return table


def _divergence(layer: LayerTable) -> str:
    """The check of the null: over tokens drawn from the model another route can only be worse on average."""
    found = [group.measures["mean_change"] for group in layer.groups if group.name == ALL]
    if not found or found[0].null is None:
        return ""
    change = found[0]
    if change.null_interval is None:
        verdict = "too few documents to tell"
    elif change.null_interval[0] > 0:
        verdict = "which cannot be, so they are not draws from the model"
    else:
        verdict = "as it must be"
    return (
        "check of the null: over tokens drawn from the model the mean route changes the log-probability by "
        f"{_number(change.null, '+')} nats ({_interval(change.null_interval)}), {verdict}"
    )


def _number(value: float | None, sign: str = "", digits: int = 4) -> str:
    return "n/a" if value is None else f"{value:{sign}.{digits}f}"


def _interval(interval: Interval | None) -> str:
    return "too few" if interval is None else f"{interval[0]:+.4f} … {interval[1]:+.4f}"
