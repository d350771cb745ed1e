"""Is a difference more than noise? The same items under two conditions, compared item by item."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 9999
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Condition minus reference over the items that both have; scores as they come (0 to 1, or nats)."""

    items: int
    mean: float  # of the condition
    difference: float
    low: float  # 95 % interval of the difference
    high: float
    p: float  # two-sided
    test: str  # "McNemar" or "sign flips"


def compare(condition: Mapping[str, float], reference: Mapping[str, float], seed: int = 0) -> Difference:
    """Paired comparison of one benchmark's items.

    The interval is a percentile bootstrap over items. p is McNemar's exact test if every score is 0 or 1,
    else the share of random sign flips of the differences with a mean as far from 0.

    Args:
        condition: item → score.
        reference: item → score, of the same items.
        seed: of the resampling.

    Raises:
        ValueError: the items differ, so that nothing could be paired.

    Source: Efron & Tibshirani (1993), ch. 13; McNemar (1947); Dror et al. (2018) for paired tests in NLP.
    """
    if condition.keys() != reference.keys() or not condition:
        missing = condition.keys() ^ reference.keys()
        raise ValueError(f"the two runs do not hold the same items ({len(missing)} are in one alone)")
    items = sorted(condition)
    own = np.array([condition[item] for item in items], dtype=np.float64)
    other = np.array([reference[item] for item in items], dtype=np.float64)
    changes = own - other
    low, high = interval(changes, seed)
    binary = np.isin(own, (0, 1)).all() and np.isin(other, (0, 1)).all()
    p = _mcnemar(changes) if binary else _sign_flips(changes, seed)
    test = "McNemar" if binary else "sign flips"
    return Difference(len(items), own.mean().item(), changes.mean().item(), low, high, p, test)


def mean(items: Mapping[str, float]) -> float:
    """Of one benchmark's items under one condition."""
    return sum(items.values()) / len(items)


def item_means(several: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Item by item, over several conditions that hold the same items."""
    return {item: sum(each[item] for each in several) / len(several) for item in several[0]}


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number: the chance that any of them is an accident (Holm, 1979)."""
    from statsmodels.stats.multitest import multipletests

    corrected: list[float] = multipletests(p_values, method="holm")[1].tolist() if p_values else []
    return corrected


def interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over items."""
    from scipy.stats import bootstrap

    changes = np.asarray(values, dtype=np.float64)
    if len(changes) < 2 or (changes == changes[0]).all():
        return changes[0].item(), changes[0].item()
    found = bootstrap(
        (changes,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile",
        batch=1000, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def _mcnemar(changes: np.ndarray) -> float:
    from scipy.stats import binomtest

    gained, lost = int((changes > 0).sum()), int((changes < 0).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _sign_flips(changes: np.ndarray, seed: int) -> float:
    from scipy.stats import permutation_test

    if not changes.any():
        return 1.0
    found = permutation_test(
        (changes,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, batch=1000,
        vectorized=True, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)
