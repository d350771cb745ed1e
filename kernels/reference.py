"""The routing step in plain torch: the definition that the Triton kernel is tested against."""

import torch

from cor_vllm.kernels.scoring import Scoring

SMALLEST = torch.finfo(torch.float32).tiny


def cor_topk(
    router_logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    renormalize: bool,
    scoring_func: str = "softmax",
    scale: float = 1.0,
    *,
    num_expert_group: int = 1,
    topk_group: int = 1,
    is_padding: torch.Tensor | None = None,
    indices_type: torch.dtype = torch.int32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The routing step with the fields of Scoring as arguments; see `route`."""
    scoring = Scoring(scoring_func, renormalize, scale, num_expert_group, topk_group)
    return route(router_logits, bias, top_k, scoring, is_padding=is_padding, indices_type=indices_type)


def route(
    router_logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    scoring: Scoring,
    *,
    is_padding: torch.Tensor | None = None,
    indices_type: torch.dtype = torch.int32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select by probability plus bias, weigh by probability alone.

        g = softmax(router_logits) or sigmoid(router_logits), float32; not finite counts as 0
        A = the top_k experts of highest g + bias, ties to the lowest id; NaN ranks below every number
        w = g[A], divided by its sum if `scoring.renormalize`, times `scoring.scale`

    Args:
        router_logits: [T, N] bf16, fp16 or fp32.
        bias: [N] float32, all that is added to g, so λ·CEI together with a model's own correction bias (see
            Scoring.total_bias), or None. The correction bias of `scoring` is not added again.
        top_k: experts per token, 1 ≤ top_k ≤ N.
        scoring: how the router scores and weighs. Experts of the groups that it drops come after all others.
        is_padding: [T] bool, rows that stand for no token: id −1, weight 0; None: there are none.
        indices_type: of the ids, torch.int32 or torch.int64.

    Returns:
        topk_weights [T, top_k] float32 and topk_ids [T, top_k], both by descending score. For any bits in
        the input the ids of a row that is not padding are distinct and in [0, N).

    Source: paper Eq. 9.
    """
    probs = probabilities(router_logits, scoring.scoring_func)
    scores = probs if bias is None else probs + bias
    return select(probs, scores, top_k, scoring, is_padding=is_padding, indices_type=indices_type)


def probabilities(router_logits: torch.Tensor, scoring_func: str = "softmax") -> torch.Tensor:
    """Router probabilities g [T, N] float32 (Eq. 1); not finite counts as 0, as in vLLM's kernel."""
    if scoring_func == "softmax":
        probs = router_logits.softmax(dim=-1, dtype=torch.float32)
    elif scoring_func == "sigmoid":
        probs = router_logits.float().sigmoid()
    else:
        raise ValueError(f"scoring_func {scoring_func!r}: must be 'softmax' or 'sigmoid'")
    return probs.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def select(
    probs: torch.Tensor,
    scores: torch.Tensor,
    top_k: int,
    scoring: Scoring,
    *,
    is_padding: torch.Tensor | None = None,
    indices_type: torch.dtype = torch.int32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k experts by `scores` [T, N], weighed by `probs` [T, N]; see `route`."""
    if scores is not probs:  # which are finite
        scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if scoring.drops_groups:
        dropped = _dropped(scores, scoring.num_expert_group, scoring.topk_group)
        order = _descending(scores.masked_fill(dropped, -torch.inf))
        # Experts of dropped groups come last rather than never, so that the ids are distinct for any top_k.
        order = order.gather(1, dropped.gather(1, order).int().sort(dim=-1, stable=True).indices)
    else:
        order = _descending(scores)
    ids = order[:, :top_k]
    weights = weigh(probs.gather(1, ids), scoring)
    ids = ids.to(indices_type).contiguous()
    if is_padding is not None:
        weights = weights.masked_fill(is_padding[:, None], 0.0)
        ids = ids.masked_fill(is_padding[:, None], -1)
    return weights, ids


def weigh(chosen: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """The weights of selected experts from their probabilities, [..., top_k] float32 each."""
    if scoring.renormalize:
        # If nothing selected has any weight, the sum is 0, and so is what it divides.
        chosen = chosen / chosen.sum(dim=-1, keepdim=True).clamp_min(SMALLEST)
    return chosen * scoring.scale if scoring.scale != 1.0 else chosen


def _descending(scores: torch.Tensor) -> torch.Tensor:
    # torch.topk leaves open which of equal scores it takes; a stable sort takes the lowest id.
    return scores.sort(dim=-1, descending=True, stable=True).indices


def _dropped(scores: torch.Tensor, num_expert_group: int, topk_group: int) -> torch.Tensor:
    """[T, N] bool: experts of the groups that are not among the topk_group best (DeepSeek-V3, §2.1.2)."""
    tokens, experts = scores.shape
    two_best = scores.view(tokens, num_expert_group, -1).topk(2).values.sum(dim=-1)
    kept = _descending(two_best.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))[
        :, :topk_group
    ]
    dropped = torch.ones_like(two_best, dtype=torch.bool).scatter(1, kept, False)
    return dropped.repeat_interleave(experts // num_expert_group, dim=1)


def random_scores(router_logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Uniform scores per token and expert that depend on nothing but the token's own logits and the seed.

    A generator would give other numbers under another batch order, on every tensor-parallel rank, and the
    same ones at every replay of a CUDA graph. Hashing the logits' bits has none of that.

    Args:
        router_logits: [T, N], any float dtype.
        seed: differs by layer.

    Returns:
        [T, N] float32 in [0, 1).
    """
    bits = router_logits.float().contiguous().view(torch.int32).long()
    experts = torch.arange(1, bits.shape[1] + 1, device=bits.device)
    token = (mix(bits + experts * 0x9E3779B97F4A7C1)).sum(dim=1, keepdim=True)
    return (mix(mix(token + seed) + experts * 0x9E3779B97F4A7C1) & 0xFFFFFF).float() / (1 << 24)


def mix(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of splitmix64 (Steele et al., 2014) on int64, which wraps around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
