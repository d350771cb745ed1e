"""Prints what is in a router file, as tables or as JSON."""

import json

from rich.console import Console
from rich.table import Table

from cor_vllm.overlay import HeldoutBin, RouterOverlay

# Figures of `diagnostics` that are shares; the others are numbers of experts or of tokens.
SHARES = ("preference_accuracy", "adoption", "neither")
MEANING = {
    "pairs": "held-out tokens for which a drawn route was better than the model's own",
    "preference_accuracy": "of these, prefer the better route more than before",
    "adoption": "execute just the better route",
    "overlap": "experts in common with the better route",
    "overlap_before": "the same with the model's own router",
    "neither": "executed slots that are in neither route",
    "changed": "experts that changed, mean of all held-out tokens",
    "changed_confident": "of confident tokens",
    "changed_ambiguous": "of ambiguous tokens",
    "changed_fragile": "of fragile tokens",
}


def overlay_as_json(overlay: RouterOverlay) -> str:
    """The layer, and the whole `config`, as JSON for programs."""
    config = overlay.config.model_dump(mode="json", by_alias=True)
    values = {"layer": overlay.layer, "fingerprint": overlay.fingerprint, "harm": overlay.config.harm()}
    return json.dumps({**values, "config": config}, indent=2)


def print_overlay(overlay: RouterOverlay, console: Console) -> None:
    """Print how the router was trained, the held-out table, what became of the routes, and the verdict."""
    config = overlay.config
    training = config.training
    how = f"objective {training.objective}"
    if training.steps:
        how += f", learning rate {training.learning_rate:g}, KL {training.kl:g}, {training.steps} steps"
    console.print(
        f"{config.model.name} ({config.model.architecture}): router of decoder layer {overlay.layer}, served "
        f"in {config.dtype}\n"
        f"trained on {training.corpus}: {training.positions} positions of {training.documents} documents\n"
        f"{how}; the weight moved by {config.drift:.2g} of its length",
        highlight=False,
    )
    console.print(_heldout_table(config.heldout))
    if training.steps:
        console.print(_diagnostics_table(config.diagnostics))
    if harm := config.harm():
        console.print(f"warning: {harm}", style="yellow", highlight=False)


def _heldout_table(heldout: dict[str, HeldoutBin]) -> Table:
    table = Table(
        "tokens", "number", "docs", "loss", "change", "95 % interval", "improved",
        title="held-out loss, nats, on documents that neither trained nor chose",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for name, found in heldout.items():
        table.add_row(name, str(found.positions), str(found.documents), *_cells(found))
    return table


def _cells(found: HeldoutBin) -> list[str]:
    if found.base is None or found.change is None or found.win_rate is None:
        return ["n/a"] * 4
    known = found.low is not None and found.high is not None
    interval = f"{found.low:+.4f} … {found.high:+.4f}" if known else "too few docs"
    return [f"{found.base:.4f}", f"{found.change:+.4f}", interval, f"{found.win_rate:.1%}"]


def _diagnostics_table(figures: dict[str, float]) -> Table:
    table = Table(
        "held-out routes", "this router", "a random change of equal size",
        title="what became of the routes",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for name, meaning in MEANING.items():
        cells = []
        for key in (name, f"random_{name}"):
            value = figures.get(key)
            shown = "n/a" if value is None else f"{value:.1%}" if name in SHARES else f"{value:.4g}"
            cells.append(shown)
        table.add_row(meaning, *cells)
    if "random_change" in figures:
        table.add_row("loss change, nats", "above", f"{figures['random_change']:+.4f}")
    return table
