"""The routing step as one Triton kernel; reference.py defines what it computes."""

import torch
import triton
import triton.language as tl

# T tokens, N experts (padded to the power of two P), K selected; shapes stand behind the names.


@triton.jit
def _ordered(x):
    """float32 → int32 whose signed order is the order of the floats (x is not NaN)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score(logits, row_max, inverse_sum, SIGMOID: tl.constexpr):
    if SIGMOID:  # noqa: SIM108 - a branch at compile time
        probs = tl.sigmoid(logits)
    else:
        probs = tl.exp(logits - row_max) * inverse_sum
    return tl.where((probs == probs) & (probs < float("inf")), probs, 0.0)


@triton.jit(do_not_specialize=["T", "scale"])
def cor_topk_kernel(
    logits_ptr,  # [T, N] bf16, fp16 or fp32, rows `stride` elements apart
    bias_ptr,  # [N] fp32, unused without HAS_BIAS
    weights_ptr,  # [T, K] fp32
    ids_ptr,  # [T, K] int32
    T,
    stride,
    scale,
    N: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,  # rows per program
    HAS_BIAS: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    SMALLEST: tl.constexpr = 1.1754943508222875e-38  # of the normal float32; a sum of 0 divides nothing
    TAKEN: tl.constexpr = -2147483648  # below the key of -inf, so padding and winners never win again
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, P)
    in_T = (rows < T)[:, None]
    in_N = (experts < N)[None, :]
    row_ptr = logits_ptr + rows[:, None] * stride
    logits_TP = tl.load(row_ptr + experts[None, :], mask=in_T & in_N, other=-float("inf")).to(tl.float32)

    row_max = tl.max(logits_TP, axis=1)[:, None]
    inverse_sum = (1.0 / tl.sum(tl.exp(logits_TP - row_max), axis=1))[:, None]
    scores_TP = _score(logits_TP, row_max, inverse_sum, SIGMOID)
    if HAS_BIAS:
        # 2-D pointers put the bias into the layout of the logits; a 1-D load would cost a layout change.
        column = tl.zeros([ROWS, 1], tl.int32) + experts[None, :]
        scores_TP += tl.load(bias_ptr + column, mask=in_N & (column >= 0), other=0.0)
        scores_TP = tl.where(scores_TP == scores_TP, scores_TP, -float("inf"))
    # Integer keys: a maximum over a warp is one instruction for them. -0.0 cannot arise, as g ≥ 0.
    keys_TP = tl.where(in_N, _ordered(scores_TP), TAKEN)

    slots = tl.arange(0, K_PAD)
    ids_TK = tl.zeros([ROWS, K_PAD], tl.int32)
    for slot in range(K):
        best = tl.max(keys_TP, axis=1)[:, None]
        winner = tl.min(tl.where(keys_TP == best, experts[None, :], P), axis=1)
        keys_TP = tl.where(experts[None, :] == winner[:, None], TAKEN, keys_TP)
        ids_TK = tl.where((slots == slot)[None, :], winner[:, None], ids_TK)

    in_K = in_T & (slots < K)[None, :]
    # The same arithmetic on the K winners, read again, is cheaper than carrying the weights along.
    chosen_TK = tl.load(row_ptr + ids_TK, mask=in_K, other=-float("inf")).to(tl.float32)
    weights_TK = tl.where(in_K, _score(chosen_TK, row_max, inverse_sum, SIGMOID), 0.0)
    if RENORMALIZE:
        total = tl.sum(weights_TK, axis=1)[:, None]
        weights_TK = weights_TK / tl.maximum(total, SMALLEST)
    out = rows[:, None] * K + slots[None, :]
    tl.store(weights_ptr + out, weights_TK * scale, mask=in_K)
    tl.store(ids_ptr + out, ids_TK, mask=in_K)


def cor_topk(
    router_logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    renormalize: bool,
    scoring_func: str = "softmax",
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The routing step of reference.cor_topk in one launch, same arguments and results.

    `router_logits` [T, N] needs unit stride within a row; rows may lie any distance apart. One warp per
    program, so that no reduction crosses a warp; no autotuning, whose benchmark would break a CUDA graph
    capture. Recompiles per (N, top_k, dtype, rows per program), never per T or scale.
    """
    tokens, experts = router_logits.shape
    topk_weights = torch.empty((tokens, top_k), dtype=torch.float32, device=router_logits.device)
    topk_ids = torch.empty((tokens, top_k), dtype=torch.int32, device=router_logits.device)
    if tokens == 0:
        return topk_weights, topk_ids
    padded = triton.next_power_of_2(experts)
    # Decode wants latency, one row per program; prefill the fewest instructions per row.
    rows = 1 if tokens <= 264 else max(1, min(8, 256 // padded))
    cor_topk_kernel[(triton.cdiv(tokens, rows),)](
        router_logits,
        bias,
        topk_weights,
        topk_ids,
        tokens,
        router_logits.stride(0),
        float(scale),
        N=experts,
        P=padded,
        K=top_k,
        K_PAD=triton.next_power_of_2(top_k),
        ROWS=rows,
        HAS_BIAS=bias is not None,
        SIGMOID=scoring_func == "sigmoid",
        RENORMALIZE=renormalize,
        num_warps=1,
        num_stages=1,
        enable_fp_fusion=False,  # a fused g + bias would break ties differently from the reference
    )
    return topk_weights, topk_ids
