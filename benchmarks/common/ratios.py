"""Ratios of things measured side by side, with a confidence interval over the rounds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t by degrees of freedom. From 30 on the last one is used, 2 % too wide.
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
      2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
      2.042)  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """A geometric mean over rounds with its 95 % t interval; one round has no interval."""

    mean: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        if self.rounds < 2:
            return f"{self.mean:.3f} (one round)"
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"

    @property
    def differs(self) -> bool:
        """Whether 1 lies outside of the interval."""
        return not self.low <= 1 <= self.high


def paired(values: Sequence[float], base: Sequence[float]) -> Ratio:
    """The ratio values[r] / base[r] over rounds r; both are measured in the same round.

    Raises:
        ValueError: no rounds, or a figure that is not positive.
    """
    if not values or min(*values, *base) <= 0:
        raise ValueError(f"ratios need positive figures, got {list(values)} and {list(base)}")
    logs = [math.log(value / other) for value, other in zip(values, base, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return Ratio(math.exp(mean), 0.0, math.inf, 1)
    half = _T[min(len(logs) - 1, len(_T)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs))


def at_least(ratio: Ratio, bound: float) -> str:
    """Whether the interval shows that the ratio reaches `bound`: "met", "missed", or "undecided"."""
    if ratio.low >= bound:
        return "met"
    return "missed" if ratio.high < bound else "undecided"


def aim(text: str, verdict: str, figure: object) -> str:
    """The line by which a program reports an aim; `make gpu` collects them."""
    return f"aim: {text}: {verdict} ({figure})"
