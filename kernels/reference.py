"""The routing step in plain torch: the definition that the Triton kernel is tested against."""

import torch

SMALLEST = torch.finfo(torch.float32).tiny


def cor_topk(
    router_logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    renormalize: bool,
    scoring_func: str = "softmax",
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select by probability plus bias, weigh by probability alone.

        g = softmax(router_logits) or sigmoid(router_logits), float32; not finite counts as 0
        A = the top_k experts of highest g + bias, ties to the lowest id; NaN ranks below every number
        w = g[A], divided by its sum where `renormalize`, times `scale`

    Args:
        router_logits: [T, N] bf16, fp16 or fp32.
        bias: [N] float32, λ·CEI with a model's own correction bias folded in, or None.
        top_k: experts per token, 1 ≤ top_k ≤ N.
        renormalize: divide the weights by their sum, at least SMALLEST.
        scoring_func: "softmax" or "sigmoid".
        scale: the model's routed scaling factor.

    Returns:
        topk_weights [T, top_k] float32 and topk_ids [T, top_k] int32, both by descending score. For any
        bits in the input the ids of a row are distinct and in [0, N).

    Source: paper Eq. 9; method.md, "Online routing".
    """
    probs = probabilities(router_logits, scoring_func)
    scores = probs if bias is None else probs + bias
    return select(probs, scores, top_k, renormalize, scale)


def probabilities(router_logits: torch.Tensor, scoring_func: str = "softmax") -> torch.Tensor:
    """Router probabilities g [T, N] float32 (Eq. 1); not finite counts as 0, as in vLLM's kernel."""
    logits = router_logits.float()
    if scoring_func == "softmax":
        probs = logits.softmax(dim=-1)
    elif scoring_func == "sigmoid":
        probs = logits.sigmoid()
    else:
        raise ValueError(f"scoring_func {scoring_func!r}: must be 'softmax' or 'sigmoid'")
    return probs.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def select(
    probs: torch.Tensor, scores: torch.Tensor, top_k: int, renormalize: bool, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k experts by `scores` [T, N], weighed by `probs` [T, N]; see `cor_topk`."""
    scores = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    # torch.topk leaves open which of equal scores it takes; a stable sort takes the lowest id.
    ids = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = probs.gather(1, ids)
    if renormalize:
        # Where nothing selected has any weight the sum is 0, and so is what it divides.
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(SMALLEST)
    return weights * scale, ids.to(torch.int32).contiguous()
