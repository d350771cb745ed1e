"""What is said of a router's logits, whatever was made of them; and when two scores are as good as tied."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cor_vllm.kernels.scoring import Scoring
from cor_vllm.modes import MODES, Mode
from cor_vllm.scores import Scores
from cor_vllm.serve.config import CorConfig
from cor_vllm.verify import judge

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXPERTS = 8


def logits(dtype: torch.dtype, tokens: int = 16) -> torch.Tensor:
    return torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_routers_that_choose_nothing(dtype):
    sound = logits(dtype)
    equal = sound[:, :1].expand(-1, EXPERTS)
    assert "the same for all experts" in judge.fault_of(equal, True)
    assert "the same for all experts" in judge.fault_of(torch.zeros_like(sound), True)
    # A sum in another order: one logit differs in its last place.
    nearly = equal.clone()
    nearly[3, 1] = torch.nextafter(nearly[3, 1], torch.tensor(torch.inf, dtype=dtype))
    assert "the same for all experts" in judge.fault_of(nearly, True)
    assert "the same for all of 16 tokens" in judge.fault_of(sound[:1].expand(16, -1), True)
    for value in (float("nan"), float("inf")):
        broken = sound.clone()
        broken[5, 2] = value
        assert "not finite" in judge.fault_of(broken, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_routers_that_are_no_fault(dtype):
    sound = logits(dtype)
    assert judge.fault_of(sound, True) is None
    assert judge.fault_of((sound.double() * 1e-3).to(dtype), True) is None  # small logits
    assert judge.fault_of(sound[:1], True) is None  # one token tells nothing
    assert judge.fault_of(sound[:0], True) is None
    assert judge.fault_of(sound[:1].expand(16, -1), False) is None  # dummy tokens
    assert judge.fault_of(sound[:, :1], True) is None  # one expert
    one = torch.zeros_like(sound)
    one[7] = sound[7]  # some tokens may be without a preference
    assert judge.fault_of(one, True) is None


def test_probabilities_that_are_one_number_in_the_logits_dtype_are_tied():
    scores = np.array([[0.4, 0.3005, 0.3, 0.2]])
    taken, other = np.array([[0, 2]]), np.array([[0, 3]])
    for dtype, tied in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, False)):
        record = SimpleNamespace(
            router_logits=torch.zeros(1, 4, dtype=dtype), scoring=Scoring("softmax", renormalize=True)
        )
        assert judge._selects(taken, scores, record, 2, rounded=True).tolist() == [tied]
        assert judge._selects(taken, scores, record, 2).tolist() == [False]  # our own step rounds nothing
        assert judge._selects(other, scores, record, 2, rounded=True).tolist() == [False]


def test_a_mode_that_the_verifier_was_not_taught_is_a_problem(
    scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it expects it computes by itself, so that a new mode must not pass as one that it knows."""
    monkeypatch.setitem(MODES, "toy", Mode("a mode of this test"))
    record = SimpleNamespace(
        layer_index=0, name="layers.0", kernel="K", modular=True, router="CorRouter", top_k=3,
        router_logits=None, topk_ids=None,
    )  # fmt: skip
    for mode, problem in (("off", False), ("toy", True)):
        (verdict,) = judge.judge([record], CorConfig(scores="x", mode=mode), scores)
        assert any("does not know what mode 'toy'" in found for found in verdict.problems) == problem
    for mode, k in (("off", 3), ("expert", 3), ("layer", 2), ("full", 2), ("random", 2)):
        (verdict,) = judge.judge([record], CorConfig(scores="x", mode=mode), scores)
        assert verdict.expected_k == k == int(scores.k[0] if k == 2 else scores.config.model.top_k)
    (verdict,) = judge.judge([record], CorConfig(scores="x", static_k=5), scores)
    assert verdict.expected_k == 5
