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
from cor_vllm.kernels.cor_topk import compile_options
from cor_vllm.kernels.dispatch import WARM_UP_TOKENS, cor_topk

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
    (2, 128, 24),  # so many that the kernel sorts
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
    logits, bias, k, renormalize, scoring="softmax", scale=1.0, atol=1e-6, rtol=1e-5, **groups
):
    want_w, want_ids = cor_topk(logits, bias, k, renormalize, scoring, scale, backend="torch", **groups)
    got_w, got_ids = cor_topk(logits, bias, k, renormalize, scoring, scale, backend="triton", **groups)
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


GROUPED = [  # N, k, groups, kept
    (256, 8, 8, 4),  # DeepSeek-V3
    (160, 6, 8, 3),  # groups of 20: no power of two
    (48, 5, 6, 2),  # six groups: no power of two either
    (16, 4, 8, 2),  # groups of two, all of both kept
    (16, 3, 4, 4),  # all groups kept: as if there were none
    (64, 20, 4, 1),  # more than the kept group holds, and sorted
    (16, 9, 4, 2),  # the same in rounds
]


@pytest.mark.parametrize(("experts", "k", "groups", "kept"), GROUPED)
def test_kernel_with_groups(experts, k, groups, kept):
    generator = torch.Generator().manual_seed(experts + k)
    logits = torch.randn(9, experts, generator=generator)
    bias = 0.3 * torch.randn(experts, generator=generator)
    options = {"num_expert_group": groups, "topk_group": kept}
    assert_kernel_is_reference(logits, bias, k, True, "sigmoid", 2.5, **options)
    assert_kernel_is_reference(logits.bfloat16(), bias, k, False, "sigmoid", **options)


def test_groups_by_their_definition():
    """Spelled out for one row: the two best of each group, the best groups, their best experts."""
    logits, bias = [2.0, -1.0, 0.5, 0.4, 1.0, 0.1, -2.0, 3.0], [0.0, 0.1, 0.0, 0.2, -0.3, 0.6, 0.0, -0.5]
    g = [1 / (1 + math.exp(-x)) for x in logits]
    score = [a + b for a, b in zip(g, bias, strict=True)]
    pairs = [score[i] + score[i + 1] for i in range(0, 8, 2)]
    kept = sorted(range(4), key=lambda group: -pairs[group])[:2]
    order = sorted((e for e in range(8) if e // 2 in kept), key=lambda e: -score[e])[:3]
    assert order != sorted(range(8), key=lambda e: -score[e])[:3]  # the groups matter
    for backend in ("torch", "triton"):
        weights, ids = cor_topk(
            torch.tensor([logits]), torch.tensor(bias), 3, True, "sigmoid", 2.0, backend,
            num_expert_group=4, topk_group=2,
        )  # fmt: skip
        assert ids[0].tolist() == order
        torch.testing.assert_close(
            weights[0], torch.tensor([2 * g[e] / sum(g[i] for i in order) for e in order])
        )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tied_groups_and_groups_that_are_not_finite(backend):
    options = {"backend": backend, "num_expert_group": 4, "topk_group": 2}
    _, ids = cor_topk(torch.zeros(2, 16), None, 10, True, "sigmoid", **options)
    assert ids.tolist() == [[*range(8), 8, 9]] * 2  # the lowest groups, then dropped experts by id
    bias = torch.zeros(16)
    bias[0], bias[1], bias[4:8] = math.inf, -math.inf, -math.inf  # groups of inf + 0, −inf − inf, 0, 0
    _, ids = cor_topk(torch.zeros(1, 16), bias, 6, True, "sigmoid", **options)
    assert ids[0].tolist() == [0, 2, 3, 8, 9, 10]
    bias = torch.zeros(8)
    bias[0], bias[1], bias[2:4] = math.inf, -math.inf, -1  # inf − inf counts as the least
    _, ids = cor_topk(torch.zeros(1, 8), bias, 4, True, "sigmoid", **options)
    assert ids[0].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("k", [3, 20])
def test_padding_rows_have_no_expert_and_no_weight(backend, k):
    logits = torch.randn(5, 24, generator=torch.Generator().manual_seed(4))
    logits[1] = math.nan
    padding = torch.tensor([False, True, False, True, False])
    want_w, want_ids = cor_topk(logits, None, k, True, backend=backend)
    weights, ids = cor_topk(logits, None, k, True, backend=backend, is_padding=padding)
    assert (ids[padding] == -1).all()
    assert (weights[padding] == 0).all()
    assert ids[~padding].equal(want_ids[~padding])
    assert weights[~padding].equal(want_w[~padding])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ids_come_in_the_type_that_is_asked_for(backend):
    logits = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))
    _, want = cor_topk(logits, None, 4, True, backend=backend)
    _, ids = cor_topk(logits, None, 4, True, backend=backend, indices_type=torch.int64)
    assert ids.dtype == torch.int64
    assert ids.equal(want.long())


def test_few_compilations_cover_every_number_of_tokens():
    """What is compiled depends on the tokens only through DECODE_TOKENS, whose two sides are warmed up."""
    for experts, groups in ((128, 1), (60, 1), (256, 8), (512, 1), (8, 1)):
        seen = {
            tuple(compile_options(experts, 4, tokens, groups, max(1, groups // 2)).items())
            for tokens in (*range(1, 600), 4096, 16384, 100_001)
        }
        warmed = {
            tuple(compile_options(experts, 4, tokens, groups, max(1, groups // 2)).items())
            for tokens in WARM_UP_TOKENS
        }
        assert seen == warmed


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_bits_give_distinct_ids_in_range_with_groups(data):
    groups, size = data.draw(st.integers(2, 5)), data.draw(st.integers(2, 6))
    kept, k = data.draw(st.integers(1, groups)), data.draw(st.integers(1, groups * size))
    raw = data.draw(st.binary(min_size=8 * groups * size, max_size=8 * groups * size))
    logits, bias = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(2, 1, -1)
    ids = [
        cor_topk(
            logits, bias[0], k, False, "sigmoid", backend=backend, num_expert_group=groups, topk_group=kept
        )[1]
        for backend in ("torch", "triton")
    ]
    for backend_ids in ids:
        assert ((backend_ids >= 0) & (backend_ids < groups * size)).all()
        assert len(set(backend_ids[0].tolist())) == k


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
        ({"num_expert_group": 3}, "num_expert_group"),
        ({"num_expert_group": 8}, "num_expert_group"),
        ({"num_expert_group": 4, "topk_group": 5}, "topk_group"),
        ({"num_expert_group": 4, "topk_group": 0}, "topk_group"),
        ({"is_padding": torch.zeros(5, dtype=torch.bool)}, "is_padding"),
        ({"is_padding": torch.zeros(4)}, "is_padding"),
        ({"indices_type": torch.int16}, "indices_type"),
    ],
)
def test_what_the_step_does_not_take_is_refused_by_name(options, says):
    arguments = {"router_logits": torch.zeros(4, 8), "bias": None, "top_k": 2, "renormalize": True, **options}
    with pytest.raises(ValueError, match=says):
        cor_topk(**arguments)
