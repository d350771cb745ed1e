"""vLLM with the plugin against transformers with the same routing, and against vLLM without the plugin."""

import dataclasses
from pathlib import Path

import pytest
import torch

from cor_vllm import scores
from cor_vllm.scores import Scores
from cor_vllm.serve.config import CorConfig, plan
from cor_vllm.serve.router import random_scores
from cor_vllm.testing.make_scores import make
from cor_vllm.testing.tiny_models import FAMILIES
from tests.parity.engine import (
    PROMPTS,
    Completion,
    generate,
    generate_without_plugin,
    reference_completions,
)

pytestmark = pytest.mark.slow
SHORT = 12  # tokens, where a difference shows at once
NO_MODEL = Path("no-such-model")


def varied(folder: Path) -> list[int]:
    """k_l from 1 over more than top_k to N."""
    own = make(folder)
    top_k, n = own.config.model.top_k, own.num_experts
    return [1, n, top_k + 1, top_k][: own.num_layers]


def written(folder: Path, values: Scores) -> dict[str, object]:
    path = folder.parent / f"{folder.name}.scores.safetensors"
    scores.save(path, values)
    return {"scores": str(path)}


def routing(values: Scores, **options: object) -> dict[int, tuple[int, torch.Tensor | None]]:
    """k_l and λ·CEI as docs/reference/method.md has them, from the file's tensors."""
    lambda_ = options.pop("lambda_", 0.1)
    layers = zip(values.layer_index.tolist(), values.k.tolist(), values.cei, strict=True)
    return {index: (k, lambda_ * cei if lambda_ else None) for index, k, cei in layers}


def assert_same(got: list[Completion], want: list[Completion], tolerance: float = 1e-4) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.tokens == b.tokens
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=tolerance, rtol=0)
        torch.testing.assert_close(
            torch.tensor(a.prompt_logprobs), torch.tensor(b.prompt_logprobs), atol=tolerance, rtol=0
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_server_routes_as_transformers_does(checkpoints, family):
    folder = checkpoints[family]
    values = make(folder, k=varied(folder))
    got = generate(folder, written(folder, values))
    assert_same(got, reference_completions(folder, routing(values), got))


class Stock:
    """What stock vLLM says by folder; one that it could not serve fails the tests that ask for it."""

    def __init__(self, answers: dict[str, list[Completion] | str]) -> None:
        self._answers = answers

    def __getitem__(self, folder: str) -> list[Completion]:
        answer = self._answers[folder]
        if isinstance(answer, str):
            pytest.fail(f"stock vLLM did not serve {folder}: {answer}")
        return answer


@pytest.fixture(scope="module")
def stock(checkpoints) -> Stock:
    return Stock(generate_without_plugin([NO_MODEL, *checkpoints.values()], SHORT))


def test_a_family_that_vllm_cannot_serve_here_takes_no_other_along(checkpoints, stock):
    with pytest.raises(pytest.fail.Exception, match=r"did not serve no-such-model: exit code 1"):
        stock[str(NO_MODEL)]
    for folder in checkpoints.values():
        assert len(stock[str(folder)]) == len(PROMPTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_lambda_0_at_the_models_own_k_is_bit_identical(checkpoints, stock, family):
    folder = checkpoints[family]
    untouched = stock[str(folder)]
    own_k = written(folder, make(folder))
    assert generate(folder, {**own_k, "lambda": 0.0}, SHORT) == untouched
    assert generate(folder, None, SHORT) == untouched  # installed, but not asked for


def test_modes(checkpoints, stock):
    """Each mode against transformers, on a model that renormalises and one that does not."""
    for family in ("qwen3_moe", "olmoe"):
        folder = checkpoints[family]
        values = make(folder, k=varied(folder))
        file, top_k = written(folder, values), values.config.model.top_k
        uniform = torch.full_like(values.k, top_k)
        static = dataclasses.replace(values, k=torch.full_like(values.k, 5))
        cases = [
            ({"mode": "layer"}, routing(values, lambda_=0), False),
            (
                {"mode": "expert", "lambda": 0.2},
                routing(dataclasses.replace(values, k=uniform), lambda_=0.2),
                False,
            ),
            ({"static_k": 5}, routing(static, lambda_=0), False),
            ({"weights": "fused"}, routing(values), True),
        ]
        seen = [stock[str(folder)]]
        for options, layers, fused in cases:
            got = generate(folder, {**file, **options}, SHORT)
            assert_same(got, reference_completions(folder, layers, got, fused))
            assert got not in seen, options  # every mode is one of its own
            seen.append(got)
        assert generate(folder, {**file, "mode": "off"}, SHORT) == stock[str(folder)]


def test_random_mode(checkpoints, stock):
    folder = checkpoints["qwen3_moe"]
    file = written(folder, make(folder))
    first = generate(folder, {**file, "mode": "random"}, SHORT)
    assert generate(folder, {**file, "mode": "random"}, SHORT) == first  # seeded
    assert generate(folder, {**file, "mode": "random", "seed": 1}, SHORT) != first
    assert first != stock[str(folder)]


def test_random_scores_are_uniform_and_independent():
    logits = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    drawn = random_scores(logits, seed=3)
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, bins=10, min=0, max=1)
    assert ((counts - 6400).abs() < 5 * (6400 * 0.9) ** 0.5).all()  # 5 standard deviations
    correlations = torch.corrcoef(torch.cat([drawn, random_scores(logits, seed=4)], dim=1).T)
    assert (correlations - torch.eye(32)).abs().max() < 5 / 4000**0.5
    assert torch.equal(drawn[:7], random_scores(logits[:7], seed=3))  # a token's draw is its own


def test_swap_rate_sets_lambda_by_layer(checkpoints):
    folder = checkpoints["qwen3_moe"]
    rates = torch.tensor([[0.01, 0.02, 0.05, 0.1, 0.2], [0.0, 0.0, 0.0, 0.0, 0.0], [0.2, 0.4, 0.4, 0.5, 0.6]])
    values = dataclasses.replace(make(folder), swap_rate=rates)
    layers = plan(CorConfig(scores="x", swap_rate=0.05), values)
    lambdas = [0.05, 0.2, 0.0025]  # measured there; beyond all that was measured; between 0 and 0.01
    for (index, layer), cei, lambda_ in zip(layers.items(), values.cei, lambdas, strict=True):
        assert layer.bias is not None, index
        torch.testing.assert_close(layer.bias, lambda_ * (cei - cei.min()))


def test_a_constant_in_a_layers_cei_changes_nothing_and_cei_changes_something(checkpoints, stock):
    folder = checkpoints["olmoe"]
    values = make(folder)
    low = dataclasses.replace(values, cei=values.cei / 2)
    raised = dataclasses.replace(values, cei=values.cei / 2 + torch.tensor([[0.0], [0.5], [0.25]]))
    got = generate(folder, written(folder, low), SHORT)
    assert got != stock[str(folder)]
    assert generate(folder, written(folder, raised), SHORT) == got
    flat = dataclasses.replace(values, cei=torch.full_like(values.cei, 0.7))
    assert generate(folder, written(folder, flat), SHORT) == stock[str(folder)]


def test_a_compiled_model_routes_the_same(checkpoints):
    """What `vllm serve` does by default; on the CPU the routing is part of the compiled graph."""
    folder = checkpoints["olmoe"]
    values = make(folder, k=varied(folder))
    got = generate(folder, written(folder, values), SHORT, enforce_eager=False, compilation_config={})
    assert_same(got, reference_completions(folder, routing(values), got))
