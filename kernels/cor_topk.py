"""The routing step as one Triton kernel; reference.py defines what it computes."""

import torch
import triton
import triton.language as tl

from cor_vllm.kernels.scoring import Scoring

# T tokens, N experts, K selected. A row has P = GROUPS · WIDTH columns, both powers of two: expert e of N/G
# to a group stands in column (e // (N/G)) · WIDTH + e % (N/G), so that a group never leaves its columns.
# Shapes stand behind the names: scores_TP.

UNROLLED = 16  # K from which on a bitonic sort takes fewer instructions than K rounds, by the sm_90 cubin
DECODE_TOKENS = 264  # two programs on each of an H100's 132 multiprocessors


@triton.jit
def _ordered(x):
    """float32 → int32 whose signed order is the order of the floats (x is not NaN)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(key):
    """The float32 that `_ordered` made `key` of."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _score(logits, row_max, inverse_sum, SIGMOID: tl.constexpr):
    if SIGMOID:  # noqa: SIM108 - a branch at compile time
        probs = tl.sigmoid(logits)
    else:
        probs = tl.exp(logits - row_max) * inverse_sum
    return tl.where((probs == probs) & (probs < float("inf")), probs, 0.0)


@triton.jit
def _winner(keys, ids, LIMIT: tl.constexpr):
    """Of each row [R, C] the lowest id that has the highest key: [R, 1]."""
    best = tl.max(keys, axis=1)[:, None]
    return tl.min(tl.where(keys == best, ids, LIMIT), axis=1)[:, None]


@triton.jit
def _in_kept_group(keys_TP, ROWS: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr):
    """[ROWS, G·WIDTH] bool: the KEPT groups whose two best scores have the highest sum."""
    TAKEN: tl.constexpr = -2147483648
    keys_TGW = tl.reshape(keys_TP, [ROWS, G, WIDTH])
    place = tl.arange(0, WIDTH)[None, None, :]
    best = tl.max(keys_TGW, axis=2)
    at = tl.min(tl.where(keys_TGW == best[:, :, None], place, WIDTH), axis=2)
    second = tl.max(tl.where(place == at[:, :, None], TAKEN, keys_TGW), axis=2)
    total_TG = _unordered(best) + _unordered(second)
    # inf − inf is NaN and ranks as −inf; adding 0.0 turns −0.0 into 0.0, which it equals.
    keys_TG = _ordered(tl.where(total_TG == total_TG, total_TG, -float("inf")) + 0.0)
    groups = tl.arange(0, G)[None, :]
    kept_TG = tl.zeros([ROWS, G], tl.int32)
    for _ in tl.static_range(KEPT):
        winner = _winner(keys_TG, groups, G)
        kept_TG = tl.where(groups == winner, 1, kept_TG)
        keys_TG = tl.where(groups == winner, TAKEN, keys_TG)
    return tl.reshape(tl.broadcast_to(kept_TG[:, :, None], [ROWS, G, WIDTH]), [ROWS, G * WIDTH]) != 0


@triton.jit
def _keys(
    scores_TP,
    in_N,
    ROWS: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
):
    """[ROWS, P] int32, what is ranked: a maximum over a warp is one instruction for integers."""
    TAKEN: tl.constexpr = -2147483648  # below the key of -inf, so padding and winners never win again
    keys_TP = tl.where(in_N, _ordered(scores_TP), TAKEN)  # -0.0 cannot arise, as g ≥ 0
    if KEPT < G:
        kept_TP = _in_kept_group(keys_TP, ROWS, GROUPS, WIDTH, KEPT)
        # Between padding and the key of -inf: experts of dropped groups come last, and distinct.
        keys_TP = tl.where(kept_TP | (keys_TP == TAKEN), keys_TP, TAKEN + 1)
    return keys_TP


@triton.jit
def _columns(N: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """[1, P] each: the expert of a column, and whether there is one."""
    SIZE: tl.constexpr = N // G
    column = tl.arange(0, GROUPS * WIDTH)[None, :]
    if SIZE == WIDTH:
        experts = column
        in_N = column < N
    else:
        experts = column // WIDTH * SIZE + column % WIDTH
        in_N = (column % WIDTH < SIZE) & (column // WIDTH < G)
    return experts, in_N


@triton.jit
def _highest(
    keys_TP,
    experts,
    slots,
    N: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    SORTED: tl.constexpr,
):
    """[ROWS, K_PAD] int32: of each row [ROWS, P] the K experts of highest key, ties to the lowest id."""
    TAKEN: tl.constexpr = -2147483648
    if SORTED:
        packed_TP = (keys_TP.to(tl.int64) << 32) | (P - 1 - experts).to(tl.int64)
        ids_TK = (P - 1) - (tl.topk(packed_TP, K_PAD, dim=1) & 0xFFFFFFFF).to(tl.int32)
    else:
        ids_TK = tl.zeros([ROWS, K_PAD], tl.int32)
        for slot in tl.static_range(K):
            winner = _winner(keys_TP, experts, N)
            keys_TP = tl.where(experts == winner, TAKEN, keys_TP)
            ids_TK = tl.where(slots == slot, winner, ids_TK)
    return ids_TK


@triton.jit(do_not_specialize=["T", "scale"])
def cor_topk_kernel(
    logits_ptr,  # [T, N] bf16, fp16 or fp32, rows `stride` elements apart
    bias_ptr,  # [N] fp32 or None
    padding_ptr,  # [T] bool or None
    weights_ptr,  # [T, K] fp32
    ids_ptr,  # [T, K] int32 or int64
    T,
    stride,
    scale,
    N: tl.constexpr,
    G: tl.constexpr,  # groups of experts, 1 if the model has none
    GROUPS: tl.constexpr,  # G and
    WIDTH: tl.constexpr,  # N / G, rounded up to powers of two
    KEPT: tl.constexpr,  # groups that are kept
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,  # rows per program
    SORTED: tl.constexpr,  # one sort in place of K rounds
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    SMALLEST: tl.constexpr = 1.1754943508222875e-38  # of the normal float32; a sum of 0 divides nothing
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    experts, in_N = _columns(N, G, GROUPS, WIDTH)
    in_T = (rows < T)[:, None]
    row_ptr = logits_ptr + rows[:, None] * stride
    logits_TP = tl.load(row_ptr + experts, mask=in_T & in_N, other=-float("inf")).to(tl.float32)

    row_max = tl.max(logits_TP, axis=1)[:, None]
    inverse_sum = (1.0 / tl.sum(tl.exp(logits_TP - row_max), axis=1))[:, None]
    scores_TP = _score(logits_TP, row_max, inverse_sum, SIGMOID)
    if bias_ptr is not None:
        # 2-D pointers put the bias into the layout of the logits; a 1-D load would cost a layout change.
        experts_TP = tl.zeros([ROWS, 1], tl.int32) + experts
        scores_TP += tl.load(bias_ptr + experts_TP, mask=in_N & (experts_TP >= 0), other=0.0)
        scores_TP = tl.where(scores_TP == scores_TP, scores_TP, -float("inf"))
    keys_TP = _keys(scores_TP, in_N, ROWS, G, GROUPS, WIDTH, KEPT)

    slots = tl.arange(0, K_PAD)[None, :]
    ids_TK = _highest(keys_TP, experts, slots, N, GROUPS * WIDTH, K, K_PAD, ROWS, SORTED)
    in_K = in_T & (slots < K)
    # The same arithmetic on the K winners, read again, is cheaper than carrying the weights along.
    chosen_TK = tl.load(row_ptr + ids_TK, mask=in_K, other=-float("inf")).to(tl.float32)
    weights_TK = tl.where(in_K, _score(chosen_TK, row_max, inverse_sum, SIGMOID), 0.0)
    if RENORMALIZE:
        total = tl.sum(weights_TK, axis=1)[:, None]
        weights_TK = weights_TK / tl.maximum(total, SMALLEST)
    weights_TK *= scale
    if padding_ptr is not None:
        no_token = tl.load(padding_ptr + rows, mask=rows < T, other=0)[:, None] != 0
        weights_TK = tl.where(no_token, 0.0, weights_TK)
        ids_TK = tl.where(no_token, -1, ids_TK)
    out = rows[:, None] * K + slots
    tl.store(weights_ptr + out, weights_TK, mask=in_K)
    tl.store(ids_ptr + out, ids_TK.to(ids_ptr.dtype.element_ty), mask=in_K)


def route(
    router_logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    scoring: Scoring,
    *,
    is_padding: torch.Tensor | None = None,
    indices_type: torch.dtype = torch.int32,
    rows: int | None = None,
    num_warps: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The routing step of reference.route in one launch, same arguments and results.

    `router_logits` [T, N] needs unit stride within a row; rows may lie any distance apart. One warp per
    program, so that no reduction crosses a warp; no autotuning, whose benchmark would break a CUDA graph
    capture. Recompiles per (N, top_k, dtype, rows per program), never per T or scale.

    Args:
        rows: rows per program, a power of two; None: by the number of tokens. For benchmarks.
        num_warps: warps per program. For benchmarks.
    """
    tokens, experts = router_logits.shape
    device = router_logits.device
    topk_weights = torch.empty((tokens, top_k), dtype=torch.float32, device=device)
    topk_ids = torch.empty((tokens, top_k), dtype=indices_type, device=device)
    if tokens == 0:
        return topk_weights, topk_ids
    shape = compile_options(experts, top_k, tokens, scoring.num_expert_group, scoring.topk_group)
    if rows is not None:
        shape["ROWS"] = rows
    cor_topk_kernel[(triton.cdiv(tokens, shape["ROWS"]),)](
        router_logits,
        bias,
        is_padding,
        topk_weights,
        topk_ids,
        tokens,
        router_logits.stride(0),
        float(scoring.scale),
        SIGMOID=scoring.scoring_func == "sigmoid",
        RENORMALIZE=scoring.renormalize,
        num_warps=num_warps,
        num_stages=1,
        enable_fp_fusion=False,  # a fused g + bias would break ties differently from the reference
        **shape,
    )
    return topk_weights, topk_ids


def compile_options(
    experts: int, top_k: int, tokens: int, num_expert_group: int = 1, topk_group: int = 1
) -> dict[str, int]:
    """What of a call's sizes is compiled into the kernel."""
    grouped = topk_group < num_expert_group
    groups = triton.next_power_of_2(num_expert_group) if grouped else 1
    width = triton.next_power_of_2(experts // num_expert_group if grouped else experts)
    # Decode wants latency, one row per program; prefill the fewest instructions per row.
    rows = 1 if tokens <= DECODE_TOKENS else max(1, min(8, 256 // (groups * width)))
    return {
        "N": experts,
        "G": num_expert_group if grouped else 1,
        "GROUPS": groups,
        "WIDTH": width,
        "KEPT": topk_group if grouped else 1,
        "K": top_k,
        "K_PAD": triton.next_power_of_2(top_k),
        "ROWS": rows,
        "SORTED": top_k > UNROLLED,
    }
