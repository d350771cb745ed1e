"""The table: every condition against standard on the same items, with what noise would do beside it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cor_vllm.evaluate import paper, verdict
from cor_vllm.evaluate.conditions import AGAIN, STANDARD
from cor_vllm.evaluate.runs import Run
from cor_vllm.evaluate.statistics import Difference, compare, holm, item_means, mean

SIGNIFICANT, NOISE = 0.01, 0.05  # corrected p below which a difference is bold, and from which it is noise
QUANTITIES = {"score": "accuracy, points", "gold": "right answer, nats", "margin": "right minus wrong, nats"}


@dataclass(frozen=True)
class Cell:
    """A condition on a benchmark, against the reference."""

    found: Difference
    corrected: float  # p, for the number of comparisons in the table
    noise: float  # |A/A difference| on this benchmark; 0 where there is no repeat


@dataclass(frozen=True)
class Control:
    """A condition against itself under permuted CEI."""

    cell: Cell  # against the mean of the permutations
    above: int  # of how many permutations its own mean is higher
    permutations: int


def cells(
    runs: Sequence[Run], quantity: str, reference: str = STANDARD, seed: int = 0
) -> dict[tuple[str, str], Cell]:
    """(condition, benchmark) → comparison with the reference; p corrected over all of them (Holm).

    Args:
        runs: the table's rows, `reference` among them.
        quantity: a key of items.Items.
    """
    base = next(run for run in runs if run.condition == reference)
    found: dict[tuple[str, str], Difference] = {}
    for run in runs:
        if run.condition == reference:
            continue
        for name, column in run.benchmarks.items():
            if name in base.benchmarks and quantity in column.items:
                other = base.benchmarks[name].items[quantity]
                found[run.condition, name] = compare(column.items[quantity], other, seed)
    compared = [key for key in found if key[0] != AGAIN]
    corrected = dict(zip(compared, holm([found[key].p for key in compared]), strict=True))
    return {
        key: Cell(
            difference,
            corrected.get(key, 1.0),
            abs(found[AGAIN, key[1]].difference) if (AGAIN, key[1]) in found else 0.0,
        )
        for key, difference in found.items()
    }


def against_permuted(runs: Sequence[Run], quantity: str, seed: int = 0) -> dict[tuple[str, str], Control]:
    """(condition, benchmark) → comparison with the same condition under permuted CEI.

    An item's control is its mean over the permutations. p corrected over all comparisons (Holm). Interval
    and p take the permutations as they are; how far one is from the next shows in how many are reached.

    Args:
        runs: the table's rows; those without permuted rows are left out.
        quantity: a key of items.Items.
    """
    by_name = {run.condition: run for run in runs}
    controls: dict[str, list[Run]] = {}
    for run in runs:
        name = re.sub(r"-permuted(-\d+)?", "", run.condition)
        if name != run.condition and name in by_name:
            controls.setdefault(name, []).append(run)
    found: dict[tuple[str, str], tuple[Difference, int, int]] = {}
    for name, permuted in controls.items():
        for benchmark, column in by_name[name].benchmarks.items():
            complete = [run.benchmarks[benchmark].items for run in permuted if benchmark in run.benchmarks]
            if complete and quantity in column.items:
                controlled = [items[quantity] for items in complete]
                difference = compare(column.items[quantity], item_means(controlled), seed)
                above = sum(mean(each) < difference.mean for each in controlled)
                found[name, benchmark] = (difference, above, len(controlled))
    corrected = holm([difference.p for difference, _, _ in found.values()])
    return {
        key: Control(Cell(difference, p, 0.0), above, permutations)
        for (key, (difference, above, permutations)), p in zip(found.items(), corrected, strict=True)
    }


def silent(runs: Sequence[Run], reference: str = STANDARD) -> dict[str, str]:
    """Benchmark → why it cannot tell whether rows differ, of those that do not tell so all the same."""
    candidates = verdict.without_room(runs)
    if not candidates or reference not in {run.condition for run in runs}:
        return candidates
    compared = cells(runs, "score", reference)
    told = {name for (_, name), cell in compared.items() if cell.corrected < NOISE}
    return {name: reason for name, reason in candidates.items() if name not in told}


def warnings(runs: Sequence[Run], cannot_tell: Mapping[str, str]) -> list[str]:
    """What a reader must know before the numbers, one line each.

    Args:
        runs: the table's rows.
        cannot_tell: of `silent`.
    """
    return [
        *(f"{name}: cannot tell a difference, {reason}" for name, reason in cannot_tell.items()),
        *verdict.notes(runs),
    ]


def render(runs: Sequence[Run], reference: str = STANDARD) -> str:
    """The whole report as Markdown: one table per quantity, the paper's numbers, what each row is."""
    names = list(dict.fromkeys(name for run in runs for name in run.benchmarks))
    first, cannot_tell = runs[0], silent(runs, reference)
    parts = [
        f"# {first.model}: {len(runs)} conditions on the same items",
        f"Back end: {first.backend}. Versions: "
        + ", ".join(f"{name} {version}" for name, version in first.versions.items())
        + "."
        + _engine(first),
        "Differences are to `"
        + reference
        + "`, item by item, with 95 % bootstrap intervals. p: McNemar's exact "
        "test, or sign flips where scores are not 0 or 1; corrected for the number of cells (Holm). "
        f"**Bold**: corrected p < {SIGNIFICANT}. *Noise*: corrected p ≥ {NOISE}, or no larger than the "
        f"difference between two runs of the same thing (`{AGAIN}`). *Cannot tell*: noise on a benchmark on "
        "which no row could have differed.",
        *(f"**Warning:** {line}." for line in warnings(runs, cannot_tell)),
    ]
    if reference not in {run.condition for run in runs}:
        nothing = f"There is no run named {reference}: nothing to compare with."
        return "\n\n".join([*parts, nothing, "## What the rows are", _legend(runs)]) + "\n"
    for quantity, title in QUANTITIES.items():
        shown = [
            n for n in names if any(quantity in r.benchmarks[n].items for r in runs if n in r.benchmarks)
        ]
        if shown:
            parts += [
                f"## {title[0].upper()}{title[1:]}",
                _table(runs, shown, quantity, reference, cannot_tell),
            ]
    parts += [*_controls(runs, names), "## What the rows are", _legend(runs)]
    return "\n\n".join(parts) + "\n"


def _engine(run: Run) -> str:
    """The flags of the engine, which are part of what was measured."""
    flags = run.settings.get("engine") or {}
    return f" Engine: {', '.join(f'{name} {value}' for name, value in flags.items())}." if flags else ""


def _table(
    runs: Sequence[Run], names: Sequence[str], quantity: str, reference: str, cannot_tell: Mapping[str, str]
) -> str:
    compared = cells(runs, quantity, reference)
    scale = 100 if quantity == "score" else 1
    lines = ["| condition | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for run in runs:
        values = []
        for name in names:
            column = run.benchmarks.get(name)
            if column is None or quantity not in column.items:
                values.append("")
                continue
            value = mean(column.items[quantity]) * scale
            cell = compared.get((run.condition, name))
            word = "cannot tell" if quantity == "score" and name in cannot_tell else "noise"
            text = f"{value:.2f}" if cell is None else f"{value:.2f} ({_difference(cell, scale, word)})"
            reported = paper.of(run.model, run.condition).get(name) if quantity == "score" else None
            values.append(text if reported is None else f"{text}; paper {reported:.2f}")
        lines.append(f"| {run.condition} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _controls(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Each condition less its own permutations; nothing where there are none."""
    compared = {quantity: against_permuted(runs, quantity) for quantity in QUANTITIES}
    lines = []
    for condition in dict.fromkeys(name for found in compared.values() for name, _ in found):
        for quantity, title in QUANTITIES.items():
            found = [compared[quantity].get((condition, name)) for name in names]
            scale = 100 if quantity == "score" else 1
            if any(found):
                values = [
                    "" if each is None
                    else f"{_difference(each.cell, scale)}; above {each.above} of {each.permutations}"
                    for each in found
                ]  # fmt: skip
                lines.append(f"| {condition} | {title} | " + " | ".join(values) + " |")
    if not lines:
        return []
    head = [
        "| condition | difference in | " + " | ".join(names) + " |",
        "| --- | --- |" + " --- |" * len(names),
    ]
    return [
        "## Against permuted CEI",
        "Each condition less the same with CEI shuffled within its layers (the mean of the permutations), on "
        "the same items: what is left is due to which experts CEI names. p corrected within each quantity; "
        "it is about the items, with these permutations. Whether CEI beats *any* permutation is for `above n "
        "of m` to say (`--permutations`).",
        "\n".join([*head, *lines]),
    ]


def _difference(cell: Cell, scale: float, noise: str = "noise") -> str:
    found = cell.found
    text = (
        f"{found.difference * scale:+.2f} [{found.low * scale:+.2f}, {found.high * scale:+.2f}], "
        f"p {_p(cell.corrected)}"
    )
    if cell.corrected >= NOISE or abs(found.difference) <= cell.noise:
        return f"{text}, *{noise}*"
    return f"**{text}**" if cell.corrected < SIGNIFICANT else text


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _legend(runs: Sequence[Run]) -> str:
    lines = [
        "| condition | what | prompts cut | experts per token, all layers | slots changed | tokens/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        timed = [(column.tokens, column.seconds) for column in run.benchmarks.values() if column.seconds]
        speed = f"{sum(t for t, _ in timed) / sum(s for _, s in timed):.0f}" if timed else ""
        lines.append(
            f"| {run.condition} | {run.description} | {_cut(run)} | "
            f"{'' if run.activations is None else f'{run.activations:g}'} | "
            f"{'' if run.slots_changed is None else f'{run.slots_changed:.1%}'} | "
            f"{speed} |"
        )
    return "\n".join(lines)


def _cut(run: Run) -> str:
    cut = sum(len(column.cut) for column in run.benchmarks.values())
    lengths = {column.max_model_len for column in run.benchmarks.values() if column.max_model_len}
    if not cut:
        return "none" if lengths else ""
    of = sum(len(column.items["score"]) for column in run.benchmarks.values())
    return f"{cut} of {of}, at {min(lengths)} tokens"
