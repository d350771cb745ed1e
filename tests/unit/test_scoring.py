"""Scoring, the noun: what it refuses, what it sums, and that it routes as the arguments it stands for."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cor_vllm.kernels import dispatch, reference
from cor_vllm.kernels.scoring import Scoring


def test_it_is_frozen() -> None:
    scoring = Scoring("softmax", renormalize=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scoring.scale = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"scoring_func": "relu"}, r"^scoring_func: 'relu', must be"),
        ({"num_expert_group": 0}, r"^topk_group: 1 of num_expert_group 0, must be"),
        ({"num_expert_group": 4, "topk_group": 5}, r"^topk_group: 5 of num_expert_group 4, must be"),
        ({"num_expert_group": 4, "topk_group": 0}, r"^topk_group: 0 of num_expert_group 4, must be"),
        ({"correction_bias": torch.zeros(2, 4)}, r"^correction_bias: \[2, 4\] torch\.float32, must be"),
        ({"correction_bias": torch.zeros(4).int()}, r"^correction_bias: \[4\] torch\.int32, must be"),
        ({"num_expert_group": 3, "correction_bias": torch.zeros(8)}, r"^num_expert_group: 3, must split 8"),
        ({"num_expert_group": 4, "correction_bias": torch.zeros(4)}, r"^num_expert_group: 4, must split 4"),
    ],
)
def test_what_no_router_does_is_refused_by_the_name_of_the_field(fields, says) -> None:
    with pytest.raises(ValueError, match=says) as error:
        Scoring(**{"scoring_func": "sigmoid", "renormalize": True, **fields})
    assert "\n" not in str(error.value)


def test_the_biases_are_summed_before_the_probabilities_come() -> None:
    """Float32 addition depends on the order; server and calibrator have to round alike."""
    own, bias = torch.tensor([1.0, 0.1]).bfloat16(), torch.tensor([1e-8, 0.2])
    scoring = Scoring("sigmoid", renormalize=True, correction_bias=own)
    assert torch.equal(scoring.total_bias(bias), own.float() + bias)
    assert torch.equal(scoring.total_bias(), own.float())
    assert scoring.total_bias().dtype == torch.float32
    without = Scoring("softmax", renormalize=True)
    assert without.total_bias(bias) is bias and without.total_bias() is None


def test_the_correction_bias_keeps_its_address() -> None:
    """The server's noun is made before the model's weights are loaded."""
    own = torch.empty(4)
    scoring = Scoring("sigmoid", renormalize=True, correction_bias=own)
    own.copy_(torch.arange(4.0))
    assert scoring.total_bias().tolist() == [0.0, 1.0, 2.0, 3.0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_face_routes_as_the_noun_does(data) -> None:
    """Any bits, softmax and sigmoid, with and without groups: the same weights and ids to the last bit."""
    groups, size = data.draw(st.sampled_from([(1, 5), (3, 4), (4, 2)]))
    kept, k = data.draw(st.integers(1, groups)), data.draw(st.integers(1, groups * size))
    name, renormalize = data.draw(st.sampled_from(["softmax", "sigmoid"])), data.draw(st.booleans())
    scale = data.draw(st.sampled_from([1.0, 2.5]))
    raw = data.draw(st.binary(min_size=12 * groups * size, max_size=12 * groups * size))
    logits, bias = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(3, -1).split([2, 1])
    backend = data.draw(st.sampled_from(["torch", "triton"]))
    loose = {"num_expert_group": groups, "topk_group": kept}
    rows = {"is_padding": torch.tensor([False, True]), "indices_type": torch.int64}
    face = dispatch.cor_topk(logits, bias[0], k, renormalize, name, scale, backend, **loose, **rows)
    scoring = Scoring(name, renormalize, scale, **loose)
    noun = dispatch.route(logits, bias[0], k, scoring, backend, **rows)
    assert all(a.view(torch.uint8).equal(b.view(torch.uint8)) for a, b in zip(face, noun, strict=True))
    if backend == "torch":
        definition = reference.cor_topk(logits, bias[0], k, renormalize, name, scale, **loose, **rows)
        assert all(torch.equal(a, b) for a, b in zip(face, definition, strict=True))


def test_groups_that_do_not_fit_the_logits_are_refused() -> None:
    scoring = Scoring("sigmoid", True, num_expert_group=3)
    with pytest.raises(ValueError, match=r"^num_expert_group: 3, must split 8 experts"):
        dispatch.route(torch.zeros(1, 8), None, 2, scoring)
