"""Tells hard from easy positions (paper, 3.2.1) and numbers the positions of a set of sequences.

The positions of all sequences stand in one row, sequence by sequence; there are P = Σ (S−1) of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cor_vllm.calibrate.config import CalibrationError


@dataclass(frozen=True, eq=False)
class Strata:
    """Which positions are hard and which are easy."""

    hard: torch.Tensor  # [P] bool
    easy: torch.Tensor  # [P] bool
    tau_high: float  # nats
    tau_low: float  # nats


def stratify(
    losses: torch.Tensor,
    hard_percentile: float,
    easy_percentile: float,
    hard_positions: torch.Tensor | None = None,
) -> Strata:
    """Split positions by their loss: above one percentile they are hard, below the other easy.

    Args:
        losses: [P] float32 ℓ of all calibration positions, nats.
        hard_percentile, easy_percentile: 0 to 100; percentiles are interpolated linearly.
        hard_positions: [P] bool, takes the place of the upper percentile; what it names is never easy.

    Raises:
        CalibrationError: there is no hard or no easy position.

    Source: paper, 3.2.1.
    """
    exact = losses.double()
    tau_high = torch.quantile(exact, hard_percentile / 100).item()
    tau_low = torch.quantile(exact, easy_percentile / 100).item()
    hard = exact > tau_high if hard_positions is None else hard_positions
    easy = (exact < tau_low) & ~hard
    for name, chosen in (("hard", hard), ("easy", easy)):
        if not chosen.any():
            raise CalibrationError(
                f"no {name} position among {len(losses)}: their losses are too few or too equal; "
                "raise --num-tokens or move the percentiles"
            )
    return Strata(hard, easy, tau_high, tau_low)


def flat_mask(positions: Sequence[Sequence[int]], sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Make a [P] bool mask out of one list of position indexes for each sequence."""
    masks = [torch.zeros(len(ids) - 1, dtype=torch.bool) for ids in sequences]
    for mask, indexes in zip(masks, positions, strict=True):
        mask[list(indexes)] = True
    return torch.cat(masks)


def locate(mask: torch.Tensor, sequences: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Find the (sequence, position) of each True in a flat [P] mask, in order."""
    pairs = [(s, t) for s, ids in enumerate(sequences) for t in range(len(ids) - 1)]
    return [pair for pair, chosen in zip(pairs, mask.tolist(), strict=True) if chosen]
