"""One entry to the routing step: checks what comes in, picks Triton or torch."""

import os
from collections.abc import Callable

import torch

from cor_vllm.kernels import reference
from cor_vllm.kernels.scoring import Scoring

_LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WARM_UP_TOKENS = (1, 1024)  # a call of each size compiles what calls of any size need (cor_topk.py)


def cor_topk(
    router_logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    renormalize: bool,
    scoring_func: str = "softmax",
    scale: float = 1.0,
    backend: str | None = None,
    *,
    num_expert_group: int = 1,
    topk_group: int = 1,
    is_padding: torch.Tensor | None = None,
    indices_type: torch.dtype = torch.int32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Counterfactual routing (paper Eq. 9): select by probability + bias, weigh by probability.

    Args:
        router_logits: [T, N] bf16, fp16 or fp32; rows may be strided.
        bias: [N] float32 on the same device, what is added to the probabilities, or None.
        top_k: experts per token, 1 ≤ top_k ≤ N.
        renormalize: divide the weights of a token by their sum.
        scoring_func: "softmax" or "sigmoid".
        scale: factor on the weights.
        backend: "triton", "torch" or None, which takes Triton on a GPU and torch elsewhere.
        num_expert_group: groups of N / num_expert_group ≥ 2 consecutive experts; 1: none.
        topk_group: experts of that many groups, those whose two best scores have the highest sum, come
            before all others.
        is_padding: [T] bool on the same device, rows that get id −1 and weight 0; None: there are none.
        indices_type: of the ids, torch.int32 or torch.int64.

    Returns:
        topk_weights [T, top_k] float32, topk_ids [T, top_k], both by descending score. The ids of a row
        that is not padding are distinct and in [0, N) for any bits in the input.

    Raises:
        ValueError: a shape, dtype, device, stride or option that the routing step does not take.
    """
    scoring = Scoring(scoring_func, renormalize, scale, num_expert_group, topk_group)
    return route(
        router_logits, bias, top_k, scoring, backend, is_padding=is_padding, indices_type=indices_type
    )


def route(
    router_logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    scoring: Scoring,
    backend: str | None = None,
    *,
    is_padding: torch.Tensor | None = None,
    indices_type: torch.dtype = torch.int32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The routing step for a router whose Scoring is at hand; `cor_topk` takes the fields one by one.

    Args:
        router_logits: as `cor_topk` takes them; so are `top_k`, `backend`, `is_padding` and `indices_type`.
        bias: [N] float32 on the same device, all that is added to the probabilities, or None. The correction
            bias of `scoring` is not added again; Scoring.total_bias makes the sum.
        scoring: how the router scores and weighs.

    Returns:
        As `cor_topk` does.

    Raises:
        ValueError: a shape, dtype, device or stride that the routing step does not take.
    """
    _check(router_logits, bias, top_k)
    scoring.check_experts(router_logits.shape[1])
    _check_rows(router_logits, is_padding, indices_type)
    step = _backend(backend, router_logits.device.type)
    return step(router_logits, bias, top_k, scoring, is_padding=is_padding, indices_type=indices_type)


def _check(logits: torch.Tensor, bias: torch.Tensor | None, top_k: int) -> None:
    if logits.dim() != 2 or logits.dtype not in _LOGITS_DTYPES:
        raise ValueError(
            f"router_logits: {list(logits.shape)} {logits.dtype}, must be [T, N] bf16, fp16 or fp32"
        )
    experts = logits.shape[1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: {top_k}, must be in [1, {experts}]")
    if logits.stride(1) != 1 and logits.numel() > 0 and experts > 1:
        raise ValueError(f"router_logits: stride {logits.stride(1)} within a row, must be 1")
    if bias is not None and (
        bias.shape != (experts,)
        or bias.dtype != torch.float32
        or bias.device != logits.device
        or not bias.is_contiguous()
    ):
        raise ValueError(
            f"bias: {list(bias.shape)} {bias.dtype} on {bias.device}, must be contiguous [{experts}] float32 "
            f"on {logits.device}"
        )


def _check_rows(logits: torch.Tensor, is_padding: torch.Tensor | None, indices_type: torch.dtype) -> None:
    if indices_type not in (torch.int32, torch.int64):
        raise ValueError(f"indices_type: {indices_type}, must be torch.int32 or torch.int64")
    if is_padding is not None and (
        is_padding.shape != logits.shape[:1]
        or is_padding.dtype != torch.bool
        or is_padding.device != logits.device
        or not is_padding.is_contiguous()
    ):
        raise ValueError(
            f"is_padding: {list(is_padding.shape)} {is_padding.dtype} on {is_padding.device}, must be "
            f"contiguous [{len(logits)}] bool on {logits.device}"
        )


def _backend(name: str | None, device: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    if name is None:
        name = "triton" if device == "cuda" else "torch"
    if name == "torch":
        return reference.route
    if name != "triton":
        raise ValueError(f"backend: {name!r}, must be 'triton', 'torch' or None")
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend 'triton' needs a GPU, or TRITON_INTERPRET=1; the logits are on {device!r}")
    from cor_vllm.kernels import cor_topk as triton_kernel

    return triton_kernel.route
