"""The report: a table for each benchmark, with every condition against standard and what noise would do."""

from collections.abc import Callable, Mapping, Sequence

from cor_vllm.evaluate import comparisons, paper, verdict
from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.evaluate.comparisons import NOISE, QUANTITIES, SIGNIFICANT, Cell, Control, Ranks
from cor_vllm.evaluate.conditions import AGAIN, ROUTER, STANDARD
from cor_vllm.evaluate.runs import Column, Run
from cor_vllm.evaluate.statistics import mean

HOW = (
    "Differences are to `{reference}`, item by item, with 95 % bootstrap intervals. p: McNemar's exact test, "
    "or sign flips where scores are not 0 or 1. *Corrected*: p corrected for the number of cells of this "
    f"quantity, over all benchmarks (Holm). **Bold**: corrected p < {SIGNIFICANT}. *Noise*: corrected p ≥ "
    f"{NOISE}, or no larger than the difference between two runs of the same thing (`{AGAIN}`). *Cannot "
    "tell*: noise on a benchmark on which no row could have differed. A mean over permutations or draws is "
    "not a comparison of its own: its p is not corrected."
)
PERMUTED = (
    "Each condition less the same with CEI shuffled within its layers (the mean of the permutations), on "
    "the same items: what is left is due to which experts CEI names. p corrected within each quantity; "
    "it is about the items, with these permutations. Whether CEI beats *any* permutation is for `above n "
    "of m` to say (`--permutations`)."
)
RANDOM_ROUTERS = (
    "`router` less a random change of the same router, as large as the trained one (the mean of the draws), "
    "on the same items: what is left is due to the direction that the training found. p corrected together "
    "with the table of permuted CEI, if there is one. Whether the trained router beats *any* random one is "
    "for `above n of m` to say (`--router-draws`)."
)
DRAWS = (
    "Calibrations and permutations as the sample: does every draw of a calibration score higher than every "
    "permutation? p: Mann and Whitney's, exact. Differences to `standard`."
)
RANKS = (
    "| benchmark | quantity | draws | mean, lowest | permutations | mean, highest | p, two-sided |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def silent(runs: Sequence[Run], reference: str = STANDARD) -> dict[str, str]:
    """Benchmark → why it cannot tell whether rows differ, of those that do not tell so all the same."""
    candidates = verdict.without_room(runs)
    if not candidates or reference not in {run.condition for run in runs}:
        return candidates
    compared = comparisons.cells(runs, "score", reference)
    told = {
        name for (_, name), cell in compared.items() if cell.corrected is not None and cell.corrected < NOISE
    }
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


def render(
    runs: Sequence[Run],
    reference: str = STANDARD,
    draws: Sequence[str] | None = None,
    controls: str | None = None,
) -> str:
    """The whole report as Markdown: one table per benchmark, the paper's numbers, what each row is.

    Args:
        runs: the table's rows, in any order.
        reference: the row that the others are held against; also the name of a mean.
        draws: as for comparisons.samples.
        controls: as for comparisons.samples.

    Raises:
        EvaluationError: there is no such reference, or rows hold other items of the same benchmark.
    """
    runs = _in_order(runs)
    comparisons.check_same_items(runs)
    means = comparisons.means(runs)
    rows = _in_order([*runs, *means])
    known = {run.condition for run in rows}
    if reference not in known and reference != STANDARD:
        raise EvaluationError(f"--reference {reference}: no such row; there are {', '.join(sorted(known))}")
    cannot_tell = silent(runs, reference)
    nothing = f"There is no run named {reference}: nothing to compare with."
    compared = {
        quantity: comparisons.cells(runs, quantity, reference, uncorrected=means)
        for quantity in QUANTITIES
        if reference in known
    }
    parts = [
        *_head(runs),
        HOW.format(reference=reference) if reference in known else nothing,
        *(f"**Warning:** {line}." for line in warnings(runs, cannot_tell)),
        *_tables(rows, lambda run, name, quantity: _value(run, name, quantity, compared, cannot_tell)),
        *_controls(runs),
        *_ranks(runs, draws, controls),
        *_legend(runs),
    ]
    return "\n\n".join(parts) + "\n"


def _in_order(rows: Sequence[Run]) -> list[Run]:
    """Standard first, and what is permuted next to what it was before."""
    by_name = {run.condition: run for run in rows}

    def place(run: Run) -> tuple[bool, bool, str, str]:
        original = run if run.control_of is None else by_name.get(run.control_of)
        stem = run.control_of or "" if original is None else original.draw_of or original.condition
        return run.condition != STANDARD, run.condition != AGAIN, stem, run.condition

    return sorted(rows, key=place)


def _head(runs: Sequence[Run]) -> list[str]:
    first = runs[0]
    title = f"# {first.model or 'a packed file'}: {len(runs)} conditions on the same items"
    versions = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    engine = ", ".join(f"{name} {value}" for name, value in (first.settings.get("engine") or {}).items())
    facts = {"Back end": first.backend, "Versions": versions, "Engine": engine}
    told = " ".join(f"{name}: {said}." for name, said in facts.items() if said)
    return [title, told] if told else [title]


def _titles(columns: Sequence[Column]) -> list[str]:
    """The quantities that a benchmark has."""
    return [quantity for quantity in QUANTITIES if any(quantity in column.items for column in columns)]


def _tables(rows: Sequence[Run], cell: Callable[[Run, str, str], str], level: str = "##") -> list[str]:
    """For each benchmark its name, and a table with a line for each row that has it.

    Args:
        rows: in their order.
        cell: (row, benchmark, quantity) → text.
        level: of the headings.
    """
    parts = []
    for name in dict.fromkeys(name for run in rows for name in run.benchmarks):
        shown = [run for run in rows if name in run.benchmarks]
        quantities = _titles([run.benchmarks[name] for run in shown])
        titles = [QUANTITIES[quantity][0] for quantity in quantities]
        lines = ["| condition | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
        for run in shown:
            values = [cell(run, name, quantity) for quantity in quantities]
            lines.append(f"| `{run.condition}` | " + " | ".join(values) + " |")
        items = len(shown[0].benchmarks[name].items["score"])
        parts += [f"{level} {name}, {items} items", "\n".join(lines)]
    return parts


def _value(
    run: Run,
    name: str,
    quantity: str,
    compared: Mapping[str, Mapping[tuple[str, str], Cell]],
    cannot_tell: Mapping[str, str],
) -> str:
    """A mean, its difference to the reference, and the paper's number; empty if the row has none."""
    items = run.benchmarks[name].items.get(quantity)
    if items is None:
        return ""
    scale = QUANTITIES[quantity][1]
    text = _signed(f"{mean(items) * scale:.2f}")
    if cell := compared.get(quantity, {}).get((run.condition, name)):
        word = "cannot tell" if quantity == "score" and name in cannot_tell else "noise"
        text += f" ({_difference(cell, scale, word)})"
    reported = paper.of(run.model, run.condition).get(name) if quantity == "score" else None
    return text if reported is None else f"{text}; paper {reported:.2f}"


def _controls(rows: Sequence[Run]) -> list[str]:
    """Each condition less its own controls; nothing if there are none."""
    found = {quantity: comparisons.against_permuted(rows, quantity) for quantity in QUANTITIES}
    controlled = {key for each in found.values() for key in each}
    permuted: list[Run] = []
    router: list[Run] = []
    for run in rows:
        kept = {
            name: column for name, column in run.benchmarks.items() if (run.condition, name) in controlled
        }
        if kept:
            of_kind = router if run.condition == ROUTER else permuted
            of_kind.append(run.model_copy(update={"benchmarks": kept}))

    def cell(run: Run, name: str, quantity: str) -> str:
        control: Control | None = found[quantity].get((run.condition, name))
        if control is None:
            return ""
        difference = _difference(control.cell, QUANTITIES[quantity][1])
        return f"{difference}; above {control.above} of {control.permutations}"

    return [
        *(["## Against permuted CEI", PERMUTED, *_tables(permuted, cell, "###")] if permuted else []),
        *(["## Against random routers", RANDOM_ROUTERS, *_tables(router, cell, "###")] if router else []),
    ]


def _ranks(runs: Sequence[Run], draws: Sequence[str] | None, controls: str | None) -> list[str]:
    """Draws of calibrations against permutations; nothing if there are not several of both."""
    parts = []
    for title, (ours, theirs) in comparisons.samples(runs, draws, controls).items():
        lines = [_rank(found) for found in comparisons.ranks(runs, ours, theirs)]
        if lines:
            parts += [f"### {title}", "\n".join([RANKS, *lines])]
    if not parts and draws is not None:
        return ["No several draws and permutations to compare."]
    return ["## Draws against permutations", DRAWS, *parts] if parts else []


def _rank(found: Ranks) -> str:
    scale = QUANTITIES[found.quantity][1]
    ours, theirs = ([value * scale for value in each] for each in (found.draws, found.permutations))
    return _signed(
        f"| {found.benchmark} | {found.quantity} | {len(ours)} | {sum(ours) / len(ours):+.2f}, "
        f"{min(ours):+.2f} | {len(theirs)} | {sum(theirs) / len(theirs):+.2f}, {max(theirs):+.2f} | "
        f"{found.p:.4f} |"
    )


def _difference(cell: Cell, scale: float, noise: str = "noise") -> str:
    found = cell.found
    text = _signed(f"{found.difference * scale:+.2f} [{found.low * scale:+.2f}, {found.high * scale:+.2f}], ")
    text += f"p {_p(found.p)}" + ("" if cell.corrected is None else f", corrected {_p(cell.corrected)}")
    if cell.is_noise:
        return f"{text}, *{noise}*"
    return f"**{text}**" if cell.corrected is not None and cell.corrected < SIGNIFICANT else text


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _signed(text: str) -> str:
    return text.replace("-", "−")


def _legend(runs: Sequence[Run]) -> list[str]:
    """What each row is and what it cost; nothing of a packed file, which does not say."""
    if not any(run.description for run in runs):
        return []
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
    return ["## What the rows are", "\n".join(lines)]


def _cut(run: Run) -> str:
    cut = sum(len(column.cut) for column in run.benchmarks.values())
    lengths = {column.max_model_len for column in run.benchmarks.values() if column.max_model_len}
    if not cut:
        return "none" if lengths else ""
    of = sum(len(column.items["score"]) for column in run.benchmarks.values())
    return f"{cut} of {of}, at {min(lengths)} tokens"
