"""DoLa against a slow recomputation of every position, and that it leaves nothing behind."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.result.heldout import Tables, rules
from cor_vllm.evaluate.dola import _divergence, candidate_layers, dola
from cor_vllm.testing import tiny_models

PLAIN = {"relative_top": 0.0, "post_softmax": False}


@pytest.fixture(scope="module")
def olmoe() -> Any:
    return tiny_models.create("olmoe")


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, tiny_models.VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def scores(model: Any, ids: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    with dola(model, *args, **options):
        found: torch.Tensor = model(ids).logits
    return found


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


@torch.no_grad()
def slow(model: Any, ids: torch.Tensor, layers: list[int], **options: Any) -> tuple[list[float], int, float]:
    """One position, in Python floats: scores of a row's last position, the layer, the runner-up's gap."""
    states = model(ids[None], output_hidden_states=True).hidden_states
    head = model.lm_head.double()
    try:
        exits = []
        for layer in layers:
            hidden = states[layer][0, -1]
            if options.get("final_norm", True):
                hidden = model.model.norm(hidden)
            exits.append(head(hidden.double()).softmax(0).tolist())
        final = head(states[-1][0, -1].double()).softmax(0).tolist()
    finally:
        model.lm_head.float()
    distances = []
    for early in exits:
        middle = [(a + b) / 2 for a, b in zip(final, early, strict=True)]
        if options.get("reversed_divergence"):
            distances.append((kl(middle, final) + kl(middle, early)) / 2)
        else:
            distances.append((kl(final, middle) + kl(early, middle)) / 2)
    best = distances.index(max(distances))
    contrast = [math.log(a / b) for a, b in zip(final, exits[best], strict=True)]
    if options.get("post_softmax", True):
        total = math.log(sum(math.exp(value) for value in contrast))
        contrast = [value - total for value in contrast]
    least = options.get("relative_top", 0.1) * max(final)
    contrast = [
        options.get("relative_top_value", -1000.0) if p < least else value
        for p, value in zip(final, contrast, strict=True)
    ]
    ordered = sorted(distances)
    return contrast, layers[best], ordered[-1] - ordered[-2] if len(layers) > 1 else math.inf


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_position_is_the_slow_recomputation(family: str) -> None:
    model, ids = tiny_models.create(family, num_hidden_layers=4), tokens(2, 9)
    layers, chosen = [3, 1, 2], set()
    found = scores(model, ids, layers)
    assert found.dtype == torch.float32 and found.shape == (2, 9, tiny_models.VOCAB)
    for row in range(2):
        for position in range(9):
            expected, layer, gap = slow(model, ids[row, : position + 1], layers)
            chosen.add(layer)
            assert gap > 1e-6, "a tie: another seed"
            torch.testing.assert_close(found[row, position], torch.tensor(expected), atol=2e-4, rtol=1e-4)
    assert family != "mixtral" or len(chosen) > 1, "always one layer: the choice goes untested"


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        ([0, 1, 2], PLAIN),
        ([0, 1, 2], {"relative_top": 0.5, "relative_top_value": -7.0}),
        ([0, 1, 2], {"post_softmax": False}),
        ([0, 1, 2], {"final_norm": False}),
        ([2], {"relative_top": 0.0}),  # DoLa-static; layer 2 is never the furthest
    ],
)
def test_options_are_the_slow_recomputation(olmoe: Any, layers: list[int], options: dict[str, Any]) -> None:
    ids = tokens(1, 12)
    found = scores(olmoe, ids, layers, **options)
    for position in range(12):
        expected, _, gap = slow(olmoe, ids[0, : position + 1], layers, **options)
        assert gap > 1e-6, "a tie: another seed"
        torch.testing.assert_close(found[0, position], torch.tensor(expected), atol=2e-4, rtol=1e-4)


def test_the_divergences_are_their_definitions() -> None:
    one, other = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for row in range(5):
        p, q = one[row].double().exp().tolist(), other[row].double().exp().tolist()
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        found = [_divergence(one, other, flag)[row].item() for flag in (False, True)]
        assert found == pytest.approx([(kl(p, m) + kl(q, m)) / 2, (kl(m, p) + kl(m, q)) / 2], abs=1e-5)


def test_the_reversed_divergence_chooses_otherwise(olmoe: Any) -> None:
    """Only where the two divergences choose different layers does a test tell them apart."""
    ids, layers = tokens(1, 40), [0, 1, 2]
    found = [scores(olmoe, ids, layers, reversed_divergence=flag)[0] for flag in (False, True)]
    different = 0
    for t in range(40):
        by_flag = [slow(olmoe, ids[0, : t + 1], layers, reversed_divergence=flag) for flag in (False, True)]
        if by_flag[0][1] != by_flag[1][1] and min(by_flag[0][2], by_flag[1][2]) > 1e-6:
            different += 1
            for values, (expected, _, _) in zip(found, by_flag, strict=True):
                torch.testing.assert_close(values[t], torch.tensor(expected), atol=2e-4, rtol=1e-4)
    assert different, "another seed"


def test_the_final_layer_against_itself_says_nothing(olmoe: Any) -> None:
    ids, last = tokens(2, 8), olmoe.config.num_hidden_layers
    assert scores(olmoe, ids, [last], **PLAIN).abs().max() < 1e-5
    uniform = scores(olmoe, ids, [last], relative_top=0.0)
    assert (uniform + math.log(tiny_models.VOCAB)).abs().max() < 1e-5


def test_slices_of_positions_change_nothing(olmoe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(3, 10)
    with monkeypatch.context() as patch:
        patch.setattr("cor_vllm.evaluate.dola.ROWS", 7)
        sliced = scores(olmoe, ids, [0, 1, 2])  # first, or rows left out could hold the whole's freed memory
    torch.testing.assert_close(sliced, scores(olmoe, ids, [0, 1, 2]))


@pytest.mark.parametrize("kept", [3, torch.tensor([1, 4])])
def test_positions_that_are_not_asked_for_are_left_out(olmoe: Any, kept: Any) -> None:
    ids = tokens(2, 10)
    whole = scores(olmoe, ids, [0, 2])
    with dola(olmoe, [0, 2]), torch.no_grad():
        part = olmoe(ids, logits_to_keep=kept).logits
    torch.testing.assert_close(part, whole[:, -3:] if isinstance(kept, int) else whole[:, kept])


def test_composes_with_routing() -> None:
    """The premature answer too comes from the changed routing: the slow recomputation under it agrees."""
    moe, ids = MoeModel(tiny_models.create("olmoe")), tokens(1, 10)
    cei = torch.rand(moe.num_layers, moe.num_experts, generator=torch.Generator().manual_seed(1))
    routed = rules(moe, Tables([2, 4, 3], cei), "full", 0.5, 0)
    plain = scores(moe.model, ids, [0, 1, 2], **PLAIN)
    with moe.routing(routed):
        inside = scores(moe.model, ids, [0, 1, 2], **PLAIN)
        expected = slow(moe.model, ids[0], [0, 1, 2], **PLAIN)[0]
    with dola(moe.model, [0, 1, 2], **PLAIN), moe.routing(routed), torch.no_grad():
        assert torch.equal(moe.model(ids).logits, inside), "the order of the contexts matters"
    torch.testing.assert_close(inside[0, -1], torch.tensor(expected), atol=2e-4, rtol=1e-4)
    assert (inside - plain).abs().max() > 0.1


def test_sees_a_scaled_layer_whichever_context_is_entered_first() -> None:
    moe, ids = MoeModel(tiny_models.create("olmoe")), tokens(1, 6)
    with moe.scale_output(1, 1.5, whole_layer=True):
        outside = scores(moe.model, ids, [2])
    with dola(moe.model, [2]), moe.scale_output(1, 1.5, whole_layer=True), torch.no_grad():
        assert torch.equal(moe.model(ids).logits, outside)


def test_nothing_is_left_behind(olmoe: Any) -> None:
    ids = tokens(1, 6)
    with torch.no_grad():
        own, before = olmoe(ids).logits, hooks(olmoe)
        for error in (None, KeyError("inside")):
            try:
                with dola(olmoe, [0, 3]):
                    olmoe(ids)
                    if error:
                        raise error
            except KeyError:
                pass
            assert torch.equal(olmoe(ids).logits, own)
            assert hooks(olmoe) == before


def test_what_the_contrast_cannot_reach_is_refused(olmoe: Any) -> None:
    ids = tokens(1, 6)
    with dola(olmoe, [0]):
        olmoe(ids)
        with pytest.raises(RuntimeError, match=r"model\(input_ids\)\.logits"):
            MoeModel(olmoe).losses(ids)
        with pytest.raises(RuntimeError, match="labels"):
            olmoe(ids, labels=ids)
        with pytest.raises(RuntimeError, match="inputs_embeds"):
            olmoe(inputs_embeds=torch.zeros(1, 2, 64))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (([],), {}, "one or more"),
        (([4],), {}, "0 .* to 3"),
        (([-1],), {}, "0 .* to 3"),
        ((), {"relative_top": 1.5}, "0 to 1"),
    ],
)
def test_wrong_arguments_are_refused(olmoe: Any, args: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), dola(olmoe, *args, **options):
        pass


@pytest.mark.parametrize(
    ("depth", "half", "tied", "expected"),
    [
        # the authors' own lists
        (32, "high", False, [16, 18, 20, 22, 24, 26, 28, 30]),
        (32, "low", False, [0, 2, 4, 6, 8, 10, 12, 14]),
        (40, "high", False, [20, 22, 24, 26, 28, 30, 32, 34, 36, 38]),
        (40, "low", False, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]),
        (60, "high", False, [40, 42, 44, 46, 48, 50, 52, 54, 56, 58]),
        (80, "low", False, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]),
        # an odd half; embeddings that are the head's own rows
        (27, "high", False, [14, 16, 18, 20, 22, 24, 26]),
        (16, "low", True, [2, 4, 6]),
    ],
)
def test_buckets(depth: int, half: Any, tied: bool, expected: list[int]) -> None:
    config = SimpleNamespace(num_hidden_layers=depth, tie_word_embeddings=tied)
    assert candidate_layers(config, half) == expected


def test_an_empty_bucket_is_refused(olmoe: Any) -> None:
    with pytest.raises(ValueError, match="give `layers`"):
        candidate_layers(SimpleNamespace(num_hidden_layers=1, tie_word_embeddings=True), "low")
    high = scores(olmoe, tokens(1, 4))
    assert torch.equal(high, scores(olmoe, tokens(1, 4), [2])), "the default is the high bucket"
