"""The routing step: the torch reference against its definition, the Triton kernel against the reference.

The kernel runs in Triton's interpreter, which needs TRITON_INTERPRET=1 before triton is imported (conftest).
Its exp differs from torch's by units in the last place, so ids are compared where scores differ by more.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cor_vllm.kernels import reference
from cor_vllm.kernels.dispatch import cor_topk

SCORE_GAP = 2e-6  # below this, the two exps may order two experts differently
# (dtype, atol, rtol) of the weights; logits are exact in float32 for every dtype
TOLERANCE = [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-6, 1e-5), (torch.float16, 1e-6, 1e-5)]

SHAPES = [  # T, N, k
    (5, 8, 2),  # Mixtral
    (7, 64, 6),  # DeepSeek-V2-Lite
    (3, 32, 4),  # GPT-OSS-20B
    (4, 128, 8),  # Qwen3-30B-A3B
    (3, 128, 12),  # more than the model's own
    (2, 60, 4),  # Qwen1.5-MoE: not a power of two
    (2, 7, 3),  # odd
    (3, 160, 6),  # DeepSeek-V2
    (2, 512, 10),  # the largest N
    (3, 64, 1),  # k = 1
    (2, 60, 60),  # k = N
    (1, 1, 1),  # one expert
    (300, 16, 3),  # several rows per program, the last program not full
]


def assert_valid(weights: torch.Tensor, ids: torch.Tensor, tokens: int, experts: int, k: int) -> None:
    assert weights.shape == ids.shape == (tokens, k)
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32
    assert ((ids >= 0) & (ids < experts)).all()
    assert all(len(set(row)) == k for row in ids.tolist())
    assert torch.isfinite(weights).all()


def assert_kernel_is_reference(
    logits, bias, k, renormalize, scoring="softmax", scale=1.0, atol=1e-6, rtol=1e-5
):
    want_w, want_ids = cor_topk(logits, bias, k, renormalize, scoring, scale, backend="torch")
    got_w, got_ids = cor_topk(logits, bias, k, renormalize, scoring, scale, backend="triton")
    assert_valid(got_w, got_ids, *logits.shape, k)
    scores = reference.probabilities(logits, scoring) + (0 if bias is None else bias)
    gap = scores.gather(1, got_ids.long()) - scores.gather(1, want_ids.long())
    assert gap.abs().nan_to_num(0).max() < SCORE_GAP
    same = (got_ids == want_ids).all(dim=1)
    torch.testing.assert_close(got_w[same], want_w[same], atol=atol * max(1, scale), rtol=rtol)


@pytest.mark.parametrize(("dtype", "atol", "rtol"), TOLERANCE)
@pytest.mark.parametrize(("tokens", "experts", "k"), SHAPES)
def test_kernel_on_random_logits(tokens, experts, k, dtype, atol, rtol):
    generator = torch.Generator().manual_seed(tokens * 1000 + experts + k)
    logits = (2 * torch.randn(tokens, experts, generator=generator)).to(dtype)
    bias = 0.1 * torch.rand(experts, generator=generator)
    assert_kernel_is_reference(logits, bias, k, True, atol=atol, rtol=rtol)
    assert_kernel_is_reference(logits, None, k, False, atol=atol, rtol=rtol)
    assert_kernel_is_reference(logits, 20 * bias, k, True, "sigmoid", 2.5, atol=atol, rtol=rtol)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ties_go_to_the_lowest_id(backend):
    flat = torch.zeros(3, 128)
    _, ids = cor_topk(flat, None, 8, True, backend=backend)
    assert ids.tolist() == [list(range(8))] * 3
    bias = torch.zeros(128)
    bias[100:110] = 0.25
    _, ids = cor_topk(flat, bias, 12, True, backend=backend)
    assert ids[0].tolist() == [*range(100, 110), 0, 1]
    _, ids = cor_topk(flat, -3 * torch.ones(128), 8, True, backend=backend)  # negative scores
    assert ids[0].tolist() == list(range(8))
    _, ids = cor_topk(torch.full((2, 60), 3.0), None, 60, True, backend=backend)
    assert ids[1].tolist() == list(range(60))


@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("biased", [False, True])
def test_kernel_on_rows_that_are_not_finite(k, biased):
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    rows[0], rows[1], rows[2] = math.nan, math.inf, -math.inf
    rows[3, 5], rows[4, 7], rows[5, :60] = math.nan, math.inf, -math.inf
    bias = 0.1 * torch.rand(64, generator=torch.Generator().manual_seed(1)) if biased else None
    want_w, want_ids = cor_topk(rows, bias, k, True, backend="torch")
    got_w, got_ids = cor_topk(rows, bias, k, True, backend="triton")
    assert_valid(got_w, got_ids, 8, 64, k)
    assert got_ids.tolist() == want_ids.tolist()
    torch.testing.assert_close(got_w, want_w)
    assert (got_w[:3] == 0).all()  # nothing to weigh by


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("banned", [-math.inf, math.nan])
def test_experts_banned_by_the_bias_come_last_and_stay_distinct(backend, banned):
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    bias = torch.full((64,), banned)
    bias[10:14] = 0.0
    weights, ids = cor_topk(logits, bias, 6, True, backend=backend)
    assert_valid(weights, ids, 4, 64, 6)
    assert all(set(row[:4]) == {10, 11, 12, 13} for row in ids.tolist())
    assert all(row[4:] == [0, 1] for row in ids.tolist())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_tokens(backend):
    weights, ids = cor_topk(torch.empty(0, 16), None, 4, True, backend=backend)
    assert weights.shape == ids.shape == (0, 4)


def test_strided_rows():
    wide = torch.randn(9, 200, generator=torch.Generator().manual_seed(2))
    assert_kernel_is_reference(wide[::2, 30:90], torch.rand(60), 7, True)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_bits_give_distinct_ids_in_range(data):
    experts = data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, experts))
    dtype, width = data.draw(st.sampled_from([(torch.float32, 4), (torch.bfloat16, 2)]))
    raw = data.draw(st.binary(min_size=2 * experts * width, max_size=2 * experts * width))
    bias_raw = data.draw(st.binary(min_size=4 * experts, max_size=4 * experts))
    logits = torch.frombuffer(bytearray(raw), dtype=dtype).view(2, experts)
    bias = torch.frombuffer(bytearray(bias_raw), dtype=torch.float32)
    for backend in ("torch", "triton"):
        _, ids = cor_topk(logits, bias, k, False, backend=backend)
        assert ((ids >= 0) & (ids < experts)).all()
        assert all(len(set(row)) == k for row in ids.tolist())


def test_reference_is_the_definition():
    """Spelled out in Python floats for one row: g, g + bias, order, weights from g."""
    logits, bias, k = [0.3, -1.0, 2.0, 0.9], [0.5, 0.0, -0.6, 0.05], 2
    e = [math.exp(x) for x in logits]
    g = [x / sum(e) for x in e]
    order = sorted(range(4), key=lambda i: -(g[i] + bias[i]))[:k]
    total = sum(g[i] for i in order)
    weights, ids = cor_topk(torch.tensor([logits]), torch.tensor(bias), k, True, scale=3.0)
    assert ids[0].tolist() == order == [0, 3]
    torch.testing.assert_close(weights[0], torch.tensor([3 * g[i] / total for i in order]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"router_logits": torch.zeros(4)}, "router_logits"),
        ({"router_logits": torch.zeros(4, 8, dtype=torch.float64)}, "router_logits"),
        ({"router_logits": torch.zeros(8, 4).T}, "stride"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 9}, "top_k"),
        ({"bias": torch.zeros(7)}, "bias"),
        ({"bias": torch.zeros(8, dtype=torch.float64)}, "bias"),
        ({"bias": torch.zeros(16)[::2]}, "bias"),
        ({"scoring_func": "relu"}, "scoring_func"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_what_the_step_does_not_take_is_refused_by_name(options, says):
    arguments = {"router_logits": torch.zeros(4, 8), "bias": None, "top_k": 2, "renormalize": True, **options}
    with pytest.raises(ValueError, match=says):
        cor_topk(**arguments)
