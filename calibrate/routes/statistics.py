"""What the utilities of a token's routes say about its standard route: pure functions, one number a token.

T tokens; G drawn routes besides the standard one; J null targets besides the realised one. Every measure is
[T, 1+J] float64: column 0 is of the token that the text has, the others are of the drawn tokens. NaN means
that the measure is not defined for a token.

An alternative is a set of experts other than the standard route's that was drawn, counted once. A utility is
better than the standard route's if it is higher by more than ε, which is what rounding alone can do.
"""

from math import comb

import numpy as np
import torch

from cor_vllm.calibrate.routes.utilities import Standard, Utilities

TOP = (1, 4, 8, 16)  # K of the membership among the best K routes
_TOKENS = 512  # whose routes are ranked at one time


def rounding(standard: Standard, utilities: Utilities) -> float:
    """ε, nats: twice the 99th percentile of what the standard route differs by between two computations.

    One is the full forward; the other is the one that evaluates all routes.
    """
    differences = (utilities.utility[:, 0] - standard.log_prob).abs().double().numpy()
    return 2 * float(np.quantile(differences, 0.99))


def alternatives(utilities: Utilities) -> torch.Tensor:
    """[T, 1+G] bool: the first draw of each set of experts that is not the standard route's."""
    numbers = torch.arange(utilities.first.shape[1])
    return (utilities.first == numbers) & (numbers > 0)


def token_measures(utilities: Utilities, epsilon: float) -> dict[str, torch.Tensor]:
    """All measures of a layer by name, each [T, 1+J] float64.

    Args:
        utilities: of the layer.
        epsilon: of `rounding`, nats.

    Returns:
        regret: the best utility among the standard route and all drawn ones, minus the standard route's.
        best_alternative: the same without the standard route, so that it can be negative.
        gap: the difference of the same two utilities as probabilities.
        rank_share: share of the alternatives that are better than the standard route.
        any_better: 1 if an alternative is better, else 0.
        tie_share: share of the alternatives that are within ε of the standard route.
        top_K: 1 if fewer than K alternatives are better, else 0.
        mean_change: mean over all draws of their utility minus the standard route's.
        correlation: Spearman's of Σ log s and utility over the distinct routes (`rank_correlation`).
        correlation_sum: the same of Σ s. Those with `_drawn` leave the standard route out.

    Source: arXiv 2605.07260, which compares a token's standard route with sampled ones in these terms.
    """
    change = utilities.utility.double() - utilities.utility[:, :1].double()
    other = alternatives(utilities)[:, :, None]
    count = other.sum(dim=1).double()
    better = ((change > epsilon) & other).sum(dim=1).double()
    tied = ((change.abs() <= epsilon) & other).sum(dim=1).double()
    regret = change.amax(dim=1)
    measures = {
        "regret": regret,
        "best_alternative": _defined(change.masked_fill(~other, -torch.inf).amax(dim=1), count > 0),
        "gap": (utilities.utility[:, 0].double() + regret).exp() - utilities.utility[:, 0].double().exp(),
        "rank_share": _defined(better / count, count > 0),
        "any_better": (better > 0).double(),
        "tie_share": _defined(tied / count, count > 0),
        "mean_change": change[:, 1:].mean(dim=1),
    }
    measures |= {f"top_{k}": (better < k).double() for k in TOP}
    return measures | _correlations(utilities, epsilon)


def _defined(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return torch.where(where, values, torch.nan)


def _correlations(utilities: Utilities, epsilon: float) -> dict[str, torch.Tensor]:
    drawn = alternatives(utilities)
    distinct = drawn.clone()
    distinct[:, 0] = True
    found = {}
    for name, scores in (("correlation", utilities.log_score), ("correlation_sum", utilities.score)):
        for suffix, routes in (("", distinct), ("_drawn", drawn)):
            columns = [
                rank_correlation(scores, utilities.utility[:, :, j], routes, epsilon)
                for j in range(utilities.utility.shape[2])
            ]
            found[name + suffix] = torch.stack(columns, dim=1)
    return found


def rank_correlation(
    scores: torch.Tensor, utility: torch.Tensor, routes: torch.Tensor, epsilon: float = 0.0
) -> torch.Tensor:
    """Spearman's correlation of each token's route scores and utilities, equal values at their mean rank.

    Args:
        scores: [T, R].
        utility: [T, R], nats.
        routes: [T, R] bool, those that count.
        epsilon: utilities that all lie within it tie.

    Returns:
        [T] float64; NaN if all scores or all utilities tie.
    """
    found = []
    for block in torch.arange(len(scores)).split(_TOKENS):
        chosen = routes[block]
        pair = [_centred_ranks(values[block], chosen) for values in (scores, utility)]
        scale = (pair[0].square().sum(dim=1) * pair[1].square().sum(dim=1)).sqrt()
        spread = utility[block].masked_fill(~chosen, -torch.inf).amax(dim=1) - utility[block].masked_fill(
            ~chosen, torch.inf
        ).amin(dim=1)
        found.append(_defined((pair[0] * pair[1]).sum(dim=1) / scale, (scale > 0) & (spread > epsilon)))
    return torch.cat(found)


def _centred_ranks(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean ranks of the chosen values of each row minus their mean; 0 for the others. [T, R] float64."""
    lower = (values[:, None] < values[:, :, None]) & chosen[:, None]
    equal = (values[:, None] == values[:, :, None]) & chosen[:, None]
    ranks = lower.sum(dim=2) + equal.sum(dim=2).double() / 2
    mean = (ranks * chosen).sum(dim=1, keepdim=True) / chosen.sum(dim=1, keepdim=True).clamp_min(1)
    return (ranks - mean) * chosen


def draw_counts(draws: int) -> list[int]:
    """The numbers of draws at which the saturation is given: 1, 2, 4, …, and all."""
    return [*(2**power for power in range(draws.bit_length()) if 2**power < draws), draws]


def saturation(utilities: Utilities) -> torch.Tensor:
    """The regret to be expected with fewer draws: [T, n, 1+J] float64, n as in `draw_counts`.

    It is the mean over all subsets of g of the G draws. The i-th smallest draw is the best of
    C(i − 1, g − 1) of the C(G, g) subsets, so that nothing has to be resampled.
    """
    change = (utilities.utility[:, 1:] - utilities.utility[:, :1]).double().clamp_min(0)
    ordered = change.sort(dim=1).values
    draws = ordered.shape[1]
    shares = [[comb(i, g - 1) / comb(draws, g) for i in range(draws)] for g in draw_counts(draws)]
    return torch.einsum("gi,tij->tgj", torch.tensor(shares, dtype=torch.float64), ordered)


def slot_changes(
    utilities: Utilities, counted: torch.Tensor, experts: int, epsilon: float
) -> list[torch.Tensor] | None:
    """Of which experts the best routes hold more than the standard ones do, and of which fewer.

    A token's best route is the standard one unless an alternative is better.

    Args:
        utilities: of a layer.
        counted: [T, 1+J] bool, the targets that count.
        experts: N.
        epsilon: of `rounding`, nats.

    Returns:
        For realised and for null targets [N] float64: slots gained minus slots lost, as a share of all slots.
        None if the routes were drawn at all layers jointly.
    """
    if utilities.ids is None:
        return None
    change = utilities.utility - utilities.utility[:, :1]
    best = torch.where(change.amax(dim=1) > epsilon, change.argmax(dim=1), 0)
    ids = utilities.ids.long()
    chosen = ids.gather(1, best[:, :, None].expand(-1, -1, ids.shape[2]))
    standard = ids[:, :1].expand_as(chosen)
    found = []
    for side in (slice(0, 1), slice(1, None)):
        mask = counted[:, side]
        after, before = (
            torch.bincount(held[:, side][mask].flatten(), minlength=experts) for held in (chosen, standard)
        )
        found.append((after - before).double() / max(int(mask.sum()) * ids.shape[2], 1))
    return found
