"""The null of a route analysis: over tokens that are drawn from the model no route is better on average."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.routes.closed_form import LastLayer, last_layer_utilities
from cor_vllm.calibrate.routes.draw import DrawOptions, draw_routes
from cor_vllm.calibrate.routes.groups import BINS, probability_groups
from cor_vllm.calibrate.routes.standard import ScoredText, read_standard
from cor_vllm.calibrate.routes.tables import layer_table
from cor_vllm.testing import tiny_models

SHARPER = 10  # times the logits, so that confident, ambiguous and fragile tokens are all there


@pytest.fixture(scope="module")
def model() -> MoeModel:
    tiny = tiny_models.create("qwen3_moe")
    tiny.lm_head.weight.data *= SHARPER
    return MoeModel(tiny)


def random_text(seed: int, documents: int, length: int = 17) -> ScoredText:
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.randint(0, tiny_models.VOCAB, (documents, length), generator=generator).tolist()
    positions = [list(range(length - 1))] * documents
    return ScoredText("random", "0" * 64, sequences, positions, list(range(documents)))


def test_tokens_drawn_from_the_model_have_no_excess(model: MoeModel) -> None:
    """One null target takes the place of the text's own; at 95 % one of 20 intervals may miss 0, or two."""
    missed = dict.fromkeys(BINS, 0)
    for seed in range(20):
        standard, last = read_standard(model, random_text(seed, 150), seed, 2)
        assert last is not None
        drawn = replace(standard, targets=standard.targets[:, 1:], log_prob=standard.log_prob[:, 1:])
        found = last_layer_utilities(model, last, drawn, DrawOptions(routes=8))
        table = layer_table(drawn, found, probability_groups(drawn.log_prob, (0.9, 0.5)), 7, seed)
        for group in table.groups:
            regret = group.measures["regret"]
            assert regret.realised is not None and regret.realised > 0 and regret.excess_interval is not None
            missed[group.name] += not regret.excess_interval[0] <= 0 <= regret.excess_interval[1]
    assert all(count <= 2 for count in missed.values()), missed


def test_over_drawn_tokens_a_route_loses_its_divergence_from_the_standard_route(model: MoeModel) -> None:
    """The mean of u_r − u₀ over tokens drawn from p₀ is −KL(p₀‖p_r), here against the whole distributions."""
    drawing = DrawOptions(routes=8)
    standard, last = read_standard(model, random_text(0, 40), 0, 128)
    assert last is not None
    utilities = last_layer_utilities(model, last, standard, drawing)
    log_probs = route_log_probs(model, standard, last, drawing)
    first = log_probs[:, :1]
    divergence = (first.exp() * (first - log_probs[:, 1:])).sum(dim=-1)
    assert divergence.min() >= -1e-5 and divergence.mean() > 0.01
    change = (utilities.utility - utilities.utility[:, :1])[:, 1:, 1:].double()
    assert_zero_within_error(change.mean(dim=(1, 2)) + divergence.mean(dim=1))
    negative_entropy = (first.exp() * first).sum(dim=(1, 2))
    assert_zero_within_error(standard.log_prob[:, 1:].double().mean(dim=1) - negative_entropy)


def assert_zero_within_error(values: torch.Tensor) -> None:
    assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5


def route_log_probs(model: MoeModel, standard: Any, last: Any, drawing: DrawOptions) -> torch.Tensor:
    """[T, 1+G, V] float64 log-probabilities of the whole vocabulary under the last layer's routes."""
    layer = model.layer_index[-1]
    routes = draw_routes(model.routers[-1], standard.router_logits[-1], standard.keys, layer, drawing, 7)
    part = LastLayer.of(model)
    with torch.inference_mode():
        outputs = part.expert_outputs(last.x, routes.ids.flatten(1))  # [T, (1+G)·k, D]
        weighted = outputs.view(*routes.ids.shape, -1) * routes.weights[..., None]
        hidden = last.residual[:, None] + weighted.sum(dim=2)
        return part.logits(hidden).double().log_softmax(dim=-1)
