"""Means over tokens and how sure they are, if whole documents are drawn again instead of single tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import erfc, sqrt

import numpy as np
import torch

from cor_vllm.calibrate.result.statistics import DOCUMENT_DRAWS, FEWEST_DOCUMENTS

LEVEL = (2.5, 97.5)  # percentiles
_CELLS = 2_000_000  # of the table of draws × documents that exists at one time

Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums and counts of one measure over the tokens of each of D documents; NaN does not count."""

    realised: np.ndarray  # [D, 2] float64, sum and count
    null: np.ndarray  # [D, 2]

    @property
    def documents(self) -> tuple[int, int]:
        """How many documents have a realised target, and how many a null one."""
        return int((self.realised[:, 1] > 0).sum()), int((self.null[:, 1] > 0).sum())


@dataclass(frozen=True)
class Means:
    """Means over tokens; intervals are 95 % percentile intervals. None: too few documents, or no token."""

    realised: float | None
    realised_interval: Interval | None
    null: float | None
    null_interval: Interval | None
    excess: float | None  # realised minus null
    excess_interval: Interval | None
    p: float | None  # that the excess is an accident, two-sided


def document_sums(values: torch.Tensor, mask: torch.Tensor, document: torch.Tensor) -> Sums:
    """Add up one measure over the chosen tokens of each document.

    Args:
        values: [T, 1+J] float64.
        mask: [T, 1+J] bool.
        document: [T] int64, 0 to D−1, each at least once.
    """
    defined = mask & ~values.isnan()
    parts = torch.stack([torch.where(defined, values, 0.0), defined.double()], dim=2)
    size = (int(document.max()) + 1, 2)
    sides = [
        torch.zeros(size, dtype=torch.float64).index_add(0, document, side).numpy()
        for side in (parts[:, 0], parts[:, 1:].sum(dim=1))
    ]
    return Sums(*sides)


def resampled_means(sums: Sequence[Sums], seed: int, draws: int = DOCUMENT_DRAWS) -> list[Means]:
    """Means of several measures over the same documents, with intervals from the same draws of documents.

    Realised and null targets are drawn together, so that the interval of the excess is a paired one. p is
    two-sided, from the standard deviation of the resampled excess and a normal law: a share of 2,000 draws
    could not become small enough to survive a correction for many layers.

    Args:
        sums: of the measures.
        seed: of the draws.
        draws: how many.

    Source: Efron & Tibshirani (1993), ch. 13; Cameron et al. (2008) for whole clusters.
    """
    table = np.stack([np.concatenate([one.realised, one.null], axis=1) for one in sums], axis=1)  # [D, K, 4]
    whole = _ratios(table.sum(axis=0)[None])[0]
    drawn = _ratios(_resampled(table, seed, draws))
    return [_means(one, whole[k], drawn[:, k]) for k, one in enumerate(sums)]


def _resampled(table: np.ndarray, seed: int, draws: int) -> np.ndarray:
    """[draws, K, 4]: the sums over D documents that are drawn with replacement."""
    documents, rng = len(table), np.random.default_rng(seed)
    flat = table.reshape(documents, -1)
    found = []
    step = max(1, _CELLS // documents)
    for start in range(0, draws, step):
        count = min(step, draws - start)
        picked = rng.integers(documents, size=(count, documents)) + documents * np.arange(count)[:, None]
        times = np.bincount(picked.ravel(), minlength=count * documents).reshape(count, documents)
        found.append(times.astype(np.float64) @ flat)
    return np.concatenate(found).reshape(draws, *table.shape[1:])


def _ratios(sums: np.ndarray) -> np.ndarray:
    """[…, K, 4] sums and counts → […, K, 3] means: realised, null, their difference. NaN without a token."""
    with np.errstate(invalid="ignore", divide="ignore"):
        realised, null = sums[..., 0] / sums[..., 1], sums[..., 2] / sums[..., 3]
    return np.stack([realised, null, realised - null], axis=-1)


def _means(sums: Sums, whole: np.ndarray, drawn: np.ndarray) -> Means:
    realised, null = sums.documents
    enough = tuple(count >= FEWEST_DOCUMENTS for count in (realised, null, min(realised, null)))
    intervals = [_interval(drawn[:, i]) if enough[i] else None for i in range(3)]
    values = [None if np.isnan(value) else float(value) for value in whole]
    p = _p_value(values[2], drawn[:, 2]) if enough[2] else None
    return Means(values[0], intervals[0], values[1], intervals[1], values[2], intervals[2], p)


def _interval(values: np.ndarray) -> Interval:
    low, high = np.nanpercentile(values, LEVEL)
    return float(low), float(high)


def _p_value(value: float | None, drawn: np.ndarray) -> float | None:
    deviation = float(np.nanstd(drawn, ddof=1))
    if value is None:
        return None
    if deviation == 0:
        return 1.0 if value == 0 else 0.0
    return erfc(abs(value) / deviation / sqrt(2))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number, in their order; None stays None and does not count.

    Source: Holm (1979).
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[i] = largest
    return corrected
