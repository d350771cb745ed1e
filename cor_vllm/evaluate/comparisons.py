"""Rows of the table against each other: every row against one of them, a row against its permutations, draws.

Which row is whose control, and which rows are draws of one and the same thing, the rows say themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.evaluate.conditions import AGAIN, ROUTER, STANDARD
from cor_vllm.evaluate.runs import Column, Run
from cor_vllm.evaluate.statistics import Difference, compare, holm, item_means, mean

SIGNIFICANT, NOISE = 0.01, 0.05  # corrected p below which a difference is bold, and from which it is noise
# Quantity of items.Items → what it is called, and what it is multiplied by
QUANTITIES = {
    "score": ("accuracy, points", 100),
    "gold": ("right answer, nats", 1),
    "margin": ("margin, nats", 1),
}


@dataclass(frozen=True)
class Cell:
    """A condition on a benchmark, against another one."""

    found: Difference
    corrected: float | None  # p, for the number of comparisons in the table; None: not one of these
    noise: float  # |A/A difference| on this benchmark; 0 if there is no repeat

    @property
    def is_noise(self) -> bool:
        """Whether it is not more than chance, or than the difference of the same thing to itself."""
        p = self.found.p if self.corrected is None else self.corrected
        return p >= NOISE or abs(self.found.difference) <= self.noise


@dataclass(frozen=True)
class Control:
    """A condition against its controls: itself under permuted CEI, or under random routers."""

    cell: Cell  # against the mean of the controls
    above: int  # of how many of them its own mean is higher
    permutations: int


@dataclass(frozen=True)
class Ranks:
    """Draws against permutations on a benchmark: calibrations as the sample."""

    benchmark: str
    quantity: str
    draws: list[float]  # mean of each over the items, less that of standard; as the items come
    permutations: list[float]
    p: float  # Mann and Whitney's, exact, two-sided


def check_same_items(rows: Sequence[Run]) -> None:
    """Rows that were asked other questions cannot be compared.

    Raises:
        EvaluationError: two rows hold other items of one benchmark.
    """
    first: dict[tuple[str, str], tuple[str, set[str]]] = {}
    for run in rows:
        for name, column in run.benchmarks.items():
            for quantity, items in column.items.items():
                other, known = first.setdefault((name, quantity), (run.condition, set(items)))
                if known != items.keys():
                    raise EvaluationError(
                        f"{name}: {run.condition} and {other} do not hold the same items "
                        f"({len(known ^ items.keys())} are in one alone); measure both with the same --limit "
                        "and --seed, into one --output"
                    )


def cells(
    runs: Sequence[Run],
    quantity: str,
    reference: str = STANDARD,
    seed: int = 0,
    uncorrected: Sequence[Run] = (),
) -> dict[tuple[str, str], Cell]:
    """(condition, benchmark) → comparison with the reference; p corrected over all of them (Holm).

    Args:
        runs: the table's rows.
        quantity: a key of items.Items.
        reference: the row that the others are held against.
        seed: of the bootstrap.
        uncorrected: further rows, which are no comparisons of their own: means over rows.
    """
    rows = [*runs, *uncorrected]
    base = next(run for run in rows if run.condition == reference)
    found = {
        (run.condition, name): compare(items, base.benchmarks[name].items[quantity], seed)
        for run in rows
        if run is not base
        for name, items in _values(run, quantity).items()
        if name in _values(base, quantity)
    }
    names = {run.condition for run in runs} - {AGAIN}
    compared = [key for key in found if key[0] in names]
    corrected = dict(zip(compared, holm([found[key].p for key in compared]), strict=True))
    repeat = _repeat(runs, quantity)
    return {
        key: Cell(difference, corrected.get(key), repeat.get(key[1], 0.0))
        for key, difference in found.items()
    }


def _values(run: Run, quantity: str) -> dict[str, dict[str, float]]:
    """Benchmark → the items of a quantity, of the benchmarks that have it."""
    return {
        name: column.items[quantity] for name, column in run.benchmarks.items() if quantity in column.items
    }


def _repeat(runs: Sequence[Run], quantity: str) -> dict[str, float]:
    """Benchmark → how far standard is from its own repeat; empty if one of them is missing."""
    values = {run.condition: _values(run, quantity) for run in runs if run.condition in (STANDARD, AGAIN)}
    first, second = values.get(STANDARD, {}), values.get(AGAIN, {})
    return {name: abs(mean(second[name]) - mean(first[name])) for name in first.keys() & second.keys()}


def against_permuted(runs: Sequence[Run], quantity: str, seed: int = 0) -> dict[tuple[str, str], Control]:
    """(condition, benchmark) → comparison with its controls: permuted CEI, or random routers.

    An item's control is its mean over the permutations. p corrected over all comparisons (Holm). Interval
    and p take the permutations as they are; how far one is from the next shows in how many are reached.

    Args:
        runs: the table's rows; those without controls are left out.
        quantity: a key of items.Items.
        seed: of the bootstrap.
    """
    found: dict[tuple[str, str], tuple[Difference, int, int]] = {}
    for run in runs:
        permuted = [_values(each, quantity) for each in runs if each.control_of == run.condition]
        for name, items in _values(run, quantity).items():
            controlled = [values[name] for values in permuted if name in values]
            if controlled:
                difference = compare(items, item_means(controlled), seed)
                above = sum(mean(each) < difference.mean for each in controlled)
                found[run.condition, name] = (difference, above, len(controlled))
    corrected = holm([difference.p for difference, _, _ in found.values()])
    return {
        key: Control(Cell(difference, p, 0.0), above, permutations)
        for (key, (difference, above, permutations)), p in zip(found.items(), corrected, strict=True)
    }


def means(runs: Sequence[Run]) -> list[Run]:
    """Rows of the means, item by item, over what is several draws of one and the same thing.

    Args:
        runs: the table's rows.

    Returns:
        A row for each name that rows share (`draw_of`); two if more draws were asked on one benchmark than on
        another.
    """
    alike: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        for name in run.benchmarks if run.draw_of else ():
            alike.setdefault((run.draw_of or "", name), []).append(run)
    found: dict[str, Run] = {}
    for (draws, name), several in alike.items():
        if len(several) > 1:
            title = f"{draws}, mean of {len(several)}"
            empty = several[0].model_copy(update={"condition": title, "benchmarks": {}})
            row = found.setdefault(title, empty)
            row.benchmarks[name] = _mean_column([run.benchmarks[name] for run in several])
    return list(found.values())


def _mean_column(columns: Sequence[Column]) -> Column:
    first = columns[0]
    items = {
        quantity: item_means([column.items[quantity] for column in columns])
        for quantity in first.items
        if all(quantity in column.items for column in columns)
    }
    return first.model_copy(update={"items": items, "seconds": None})


def samples(
    runs: Sequence[Run], draws: Sequence[str] | None = None, controls: str | None = None
) -> dict[str, tuple[set[str], set[str]]]:
    """Which calibrations are held against which permutations, by rank: title → (conditions, conditions).

    Args:
        runs: the table's rows.
        draws: patterns of conditions, with `*`; None: every several draws of one and the same thing, if at
            least one of them has numbered permutations.
        controls: a pattern; None: every numbered permutation.
    """
    numbered = [run for run in runs if run.control_of not in (None, ROUTER) and run.draw_of]
    theirs = (
        {run.condition for run in numbered}
        if controls is None
        else {run.condition for run in runs if fnmatchcase(run.condition, controls)}
    )
    if draws is not None:
        ours = {run.condition for run in runs if any(fnmatchcase(run.condition, each) for each in draws)}
        return {" ".join(draws): (ours, theirs)}
    controlled = {run.control_of for run in numbered}
    found: dict[str, set[str]] = {}
    for run in runs:
        if run.draw_of and not run.control_of:
            found.setdefault(run.draw_of, set()).add(run.condition)
    return {title: (ours, theirs) for title, ours in found.items() if ours & controlled}


def ranks(runs: Sequence[Run], draws: set[str], permutations: set[str]) -> list[Ranks]:
    """Do calibrations score higher than permutations, if both are the sample?

    Args:
        runs: the table's rows, `standard` among them, or nothing is compared.
        draws: conditions.
        permutations: conditions.

    Returns:
        One for each benchmark and quantity that two or more of both have.
    """
    base = next((run for run in runs if run.condition == STANDARD), None)
    found = []
    for name, column in base.benchmarks.items() if base else ():
        for quantity, items in column.items.items():
            shifts = _shifts(runs, name, quantity, mean(items))
            ours = [shift for condition, shift in shifts.items() if condition in draws]
            theirs = [shift for condition, shift in shifts.items() if condition in permutations]
            if len(ours) > 1 and len(theirs) > 1:
                found.append(Ranks(name, quantity, ours, theirs, _mann_whitney(ours, theirs)))
    return found


def _shifts(runs: Sequence[Run], name: str, quantity: str, base: float) -> Mapping[str, float]:
    """Condition → its mean on a benchmark, less `base`."""
    values = {run.condition: _values(run, quantity) for run in runs}
    return {condition: mean(each[name]) - base for condition, each in values.items() if name in each}


def _mann_whitney(ours: Sequence[float], theirs: Sequence[float]) -> float:
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(ours, theirs, method="exact").pvalue)
