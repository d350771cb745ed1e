"""Groups of tokens by the probability that the standard route gives them, and equal numbers of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from cor_vllm.calibrate.routes.standard import LastInputs, ScoredText
from cor_vllm.calibrate.routes.utilities import Standard
from cor_vllm.kernels.reference import mix

BINS = ("confident", "ambiguous", "fragile")
ALL = "all"
DECILES = 10
_ORDER = 0x5851F42D4C957F2D  # keeps the order of the quotas apart from all other noise


@dataclass(frozen=True, eq=False)
class Group:
    """Targets whose probability lies between two bounds: realised ones by theirs, null ones by theirs."""

    name: str
    low: float
    high: float
    mask: torch.Tensor  # [T, 1+J] bool
    share: tuple[float, float]  # of all realised, and of all null targets

    def of(self, counted: torch.Tensor, rows: torch.Tensor) -> "Group":
        """The group among the `rows` [T] bool, with the targets that are `counted` [T, 1+J] bool alone."""
        return replace(self, mask=(self.mask & counted)[rows])


def probability_groups(log_prob: torch.Tensor, edges: Sequence[float]) -> list[Group]:
    """The three groups of BINS; the first has p ≥ edges[0], the last p < edges[1].

    Args:
        log_prob: [T, 1+J] of the targets under the standard route, nats.
        edges: two probabilities, descending.
    """
    bounds = [(edges[0], 1.0), (edges[1], edges[0]), (0.0, edges[1])]
    return [_group(name, low, high, log_prob) for name, (low, high) in zip(BINS, bounds, strict=True)]


def further_groups(log_prob: torch.Tensor) -> list[Group]:
    """All targets, and ten groups between the deciles of the realised targets' probabilities, ascending."""
    p = log_prob[:, 0].double().exp().numpy()
    edges = [0.0, *np.quantile(p, np.arange(1, DECILES) / DECILES).tolist(), 1.0]
    tenths = [_group(f"decile {i + 1}", low, high, log_prob) for i, (low, high) in enumerate(pairwise(edges))]
    return [_group(ALL, 0.0, 1.0, log_prob), *tenths]


def _group(name: str, low: float, high: float, log_prob: torch.Tensor) -> Group:
    """Targets with low ≤ p < high; a group that ends at 1 has those with p = 1, too."""
    p = log_prob.double().exp()
    mask = (p >= low) & ((p < high) | (high >= 1.0))
    share = mask[:, 0].double().mean().item(), mask[:, 1:].double().mean().item()
    return Group(name, low, high, mask, share)


def balanced(keys: torch.Tensor, groups: Sequence[Group], most: int) -> torch.Tensor:
    """Choose equally many realised and null targets of each group, by a hash of their tokens' keys.

    Which targets are chosen depends on their own probability under the standard route alone. Realised and
    null ones are chosen apart, so that each group holds a fair sample of either.

    Args:
        keys: [T] int64, of the tokens.
        groups: of all tokens.
        most: tokens that may be needed in all.

    Returns:
        [T, 1+J] bool: the targets that count. At most `most` tokens have one.
    """
    order = mix(keys + _ORDER).argsort()
    chosen = torch.zeros_like(groups[0].mask)
    quota = most // (len(groups) * chosen.shape[1])
    for group in groups:
        for column in range(chosen.shape[1]):
            rows = order[group.mask[order, column]][:quota]
            chosen[rows, column] = True
    return chosen


def only(
    rows: torch.Tensor, text: ScoredText, standard: Standard, last: LastInputs | None
) -> tuple[ScoredText, Standard, LastInputs | None]:
    """The same text with only those of its T scored positions that `rows` [T] bool names."""
    places = standard.places
    positions: list[list[int]] = [[] for _ in text.sequences]
    chosen = rows.nonzero()[:, 0]
    for sequence, position in zip(
        places.sequence[chosen].tolist(), places.position[chosen].tolist(), strict=True
    ):
        positions[sequence].append(position)
    part = Standard(
        places[chosen],
        standard.document[chosen],
        standard.keys[chosen],
        standard.targets[chosen],
        standard.log_prob[chosen],
        [logits[chosen] for logits in standard.router_logits],
    )
    inputs = None if last is None else LastInputs(last.x[chosen], last.residual[chosen])
    return replace(text, positions=positions), part, inputs
