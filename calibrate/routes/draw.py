"""Routes of equal compute: other sets of as many experts as the model itself would take for a token.

T tokens, N experts, k of them in a route, a pool of P that routes are drawn from, G draws.

Source: arXiv 2605.07260; Kool et al. (2019) for drawing without replacement by Gumbel noise.
"""

from dataclasses import dataclass

import torch

from cor_vllm.calibrate.model.router import Router
from cor_vllm.calibrate.routes.noise import mixed, uniform
from cor_vllm.kernels import reference
from cor_vllm.kernels.reference import SMALLEST

_TOKENS = 512  # whose routes are compared with each other at one time


@dataclass(frozen=True)
class DrawOptions:
    """How routes are drawn."""

    routes: int = 32  # G
    pool: int = 32  # experts of highest score that a route is drawn from; at most all eligible ones
    temperature: float = 1.0


@dataclass(frozen=True, eq=False)
class Routes:
    """The standard route (number 0) and G drawn ones (1 to G) of T tokens at one MoE layer."""

    pool: torch.Tensor  # [T, P] int64, expert ids by descending score; they hold the standard route
    ranks: torch.Tensor  # [T, 1+G, k] int64, the routes' experts as positions in `pool`
    ids: torch.Tensor  # [T, 1+G, k] int64, the same as expert ids, ascending
    weights: torch.Tensor  # [T, 1+G, k] float32, by the model's own rule on its own probabilities
    first: torch.Tensor  # [T, 1+G] int64, the number of the first route with the same experts
    log_score: torch.Tensor  # [T, 1+G] float32, Σ log s_e over the route's experts
    score: torch.Tensor  # [T, 1+G] float32, Σ s_e

    @property
    def distinct(self) -> torch.Tensor:
        """[T, 1+G] bool: the first of its set of experts. The standard route always is."""
        return self.first == torch.arange(self.first.shape[1])

    def __getitem__(self, rows: slice) -> "Routes":
        return Routes(*(values[rows] for values in vars(self).values()))


def selection_scores(router: Router, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities g and the scores s that the model selects by, [T, N] float32 each.

    Scores contain a correction bias, so they can be negative; the law of the draws takes those as 0.
    """
    probs = router.probabilities(router_logits)
    return probs, router.scores(probs)


def uniform_noise(keys: torch.Tensor, layer: int, routes: int, experts: torch.Tensor) -> torch.Tensor:
    """Numbers in (0, 1), ends excluded, that depend on token, layer, route and expert alone.

    A generator would give other numbers under another batch size, order or pool.

    Args:
        keys: [T] int64, one for each token (`positions.token_keys`).
        layer: decoder layer number.
        routes: G.
        experts: [T, P] int64 expert ids.

    Returns:
        [T, G, P] float64.
    """
    return _noise(keys[:, None], layer, torch.arange(1, routes + 1), experts[:, None])


def _noise(keys: torch.Tensor, layer: int, route: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """[…, P] float64 noise of `experts` […, P] for the keys and route numbers […] that go with them."""
    of_route = mixed(mixed(keys, layer + 1), route)
    return uniform(mixed(of_route[..., None], experts + 1))


def draw_ranks(
    scores: torch.Tensor, noise: torch.Tensor, top_k: int, temperature: float = 1.0
) -> torch.Tensor:
    """Draw k of P experts without replacement, each in proportion to its score (Plackett–Luce).

    Args:
        scores: [T, P] float32, what the experts are selected by.
        noise: [T, G, P] float64 in (0, 1).
        temperature: divides log scores; large values draw all sets alike.

    Returns:
        [T, G, k] int64, positions in the pool.
    """
    gumbel = -(-noise.log()).log()
    log_scores = scores.double().clamp_min(SMALLEST).log() / temperature
    return (log_scores[:, None] + gumbel).topk(top_k, dim=-1).indices


def draw_routes(
    router: Router, router_logits: torch.Tensor, keys: torch.Tensor, layer: int, options: DrawOptions,
    eligible: int,
) -> Routes:  # fmt: skip
    """The standard route of each token and G draws.

    Args:
        router: of the layer.
        router_logits: [T, N], on the CPU.
        keys: [T] int64, see `uniform_noise`.
        layer: decoder layer number.
        options: how to draw.
        eligible: experts that one token can choose among (`families.eligible_experts`).
    """
    probs, pool, pool_scores = _pool(router, router_logits, options, eligible)
    noise = uniform_noise(keys, layer, options.routes, pool)
    drawn = draw_ranks(pool_scores, noise, router.top_k, options.temperature)
    standard = torch.arange(router.top_k).expand(len(pool), 1, -1)  # the first of the pool, which is sorted
    return routes_of(router, probs, pool_scores, pool, torch.cat([standard, drawn], dim=1))


def draw_numbered(
    router: Router, router_logits: torch.Tensor, keys: torch.Tensor, layer: int, number: torch.Tensor,
    options: DrawOptions, eligible: int,
) -> Routes:  # fmt: skip
    """One route of each row: the one that `draw_routes` gives that number.

    Args:
        number: [R] int64, from 0, the standard route, to G.
        router, router_logits, keys, layer, options, eligible: as in `draw_routes`, with R rows for T tokens.

    Returns:
        Routes of R tokens with one route each.
    """
    probs, pool, pool_scores = _pool(router, router_logits, options, eligible)
    noise = _noise(keys, layer, number, pool)
    drawn = draw_ranks(pool_scores, noise[:, None], router.top_k, options.temperature)
    standard = torch.arange(router.top_k).expand(len(pool), 1, -1)
    return routes_of(
        router, probs, pool_scores, pool, torch.where(number[:, None, None] > 0, drawn, standard)
    )


def _pool(
    router: Router, router_logits: torch.Tensor, options: DrawOptions, eligible: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Probabilities [T, N], and the experts that routes are drawn from with their scores, [T, P] each."""
    probs, scores = selection_scores(router, router_logits)
    _, pool = router.select(probs, scores, max(router.top_k, min(options.pool, eligible)))
    pool = pool.long()
    return probs, pool, scores.gather(1, pool)


def routes_of(
    router: Router, probs: torch.Tensor, pool_scores: torch.Tensor, pool: torch.Tensor, ranks: torch.Tensor
) -> Routes:
    """Routes whose experts are known.

    Args:
        router: of the layer.
        probs: [T, N] float32 of all experts.
        pool_scores, pool: [T, P] float32 scores and int64 ids of the pool.
        ranks: [T, 1+G, k] int64, positions in the pool; route 0 has to be the standard one.
    """
    routes = ranks.shape[1]

    def of_pool(values: torch.Tensor) -> torch.Tensor:
        return values[:, None].expand(-1, routes, -1).gather(2, ranks)

    ids, order = of_pool(pool).sort(dim=-1)
    ranks = ranks.gather(2, order)
    scores = of_pool(pool_scores)
    return Routes(
        pool=pool,
        ranks=ranks,
        ids=ids,
        weights=reference.weigh(of_pool(probs.gather(1, pool)), router.scoring),
        first=_first_equal(ids),
        log_score=scores.clamp_min(SMALLEST).log().sum(dim=-1),
        score=scores.sum(dim=-1),
    )


def _first_equal(ids: torch.Tensor) -> torch.Tensor:
    """[T, R] the number of the first of each token's sorted routes [T, R, k] with the same experts."""
    found = []
    for block in ids.split(_TOKENS):
        same = (block[:, :, None] == block[:, None]).all(dim=-1)
        found.append(same.int().argmax(dim=-1))
    return torch.cat(found)
