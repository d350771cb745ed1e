"""One entry to the routing step: checks what comes in, picks Triton or torch."""

import os
from collections.abc import Callable

import torch

from cor_vllm.kernels import reference

_LOGITS_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cor_topk(
    router_logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    renormalize: bool,
    scoring_func: str = "softmax",
    scale: float = 1.0,
    backend: str | None = None,
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

    Returns:
        topk_weights [T, top_k] float32, topk_ids [T, top_k] int32, both by descending score. The ids of a
        row are distinct and in [0, N) for any bits in the input.

    Raises:
        ValueError: a shape, dtype, device, stride or option that the routing step does not take.
    """
    _check(router_logits, bias, top_k, scoring_func)
    route = _backend(backend, router_logits.device.type)
    return route(router_logits, bias, top_k, renormalize, scoring_func, scale)


def _check(logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, scoring_func: str) -> None:
    if logits.dim() != 2 or logits.dtype not in _LOGITS_DTYPES:
        raise ValueError(
            f"router_logits: {list(logits.shape)} {logits.dtype}, must be [T, N] bf16, fp16 or fp32"
        )
    experts = logits.shape[1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k: {top_k}, must be in [1, {experts}]")
    if logits.stride(1) != 1 and logits.numel() > 0 and experts > 1:
        raise ValueError(f"router_logits: stride {logits.stride(1)} within a row, must be 1")
    if scoring_func not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring_func: {scoring_func!r}, must be 'softmax' or 'sigmoid'")
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


def _backend(name: str | None, device: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    if name is None:
        name = "triton" if device == "cuda" else "torch"
    if name == "torch":
        return reference.cor_topk
    if name != "triton":
        raise ValueError(f"backend: {name!r}, must be 'triton', 'torch' or None")
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend 'triton' needs a GPU, or TRITON_INTERPRET=1; the logits are on {device!r}")
    from cor_vllm.kernels import cor_topk as triton_kernel

    return triton_kernel.cor_topk
