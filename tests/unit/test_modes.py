"""A mode is a row of one table: server, held-out check, evaluation and tuning follow it."""

import argparse
from typing import Any

import pytest
import torch

from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.router import rule_of
from cor_vllm.calibrate.result import heldout
from cor_vllm.evaluate.conditions import modes as conditions
from cor_vllm.evaluate.routing import routed
from cor_vllm.evaluate.tuning import grid_conditions
from cor_vllm.kernels.reference import random_scores
from cor_vllm.live.state import Change, ChangeError
from cor_vllm.modes import MODES, LayerRouting, Mode, Setting, Tables, by_size, plan
from cor_vllm.scores import Scores
from cor_vllm.serve import config, flags
from cor_vllm.testing.tiny_models import create

LOGITS = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> MoeModel:
    return MoeModel(create("qwen3_moe"))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """Experts that hurt least are preferred: one row, written nowhere else."""
    row = Mode("λ·(1 − CEI) alone", bias=lambda cei, lambda_: lambda_ * (1 - cei))
    monkeypatch.setitem(MODES, "toy", row)
    return "toy"


def choices() -> Any:
    parser = flags.add(argparse.ArgumentParser())
    (action,) = (action for action in parser._actions if action.dest == "cor_mode")
    return action.choices


def test_a_mode_that_no_row_defines_is_refused_everywhere(scores: Scores) -> None:
    """What `toy` adds is not there without it."""
    assert "toy" not in choices()
    with pytest.raises(config.ConfigError, match=r"cor\.mode: Input should be 'full'"):
        config.CorConfig.of({"scores": "x", "mode": "toy"})
    with pytest.raises(ChangeError, match="mode: Input should be 'full'"):
        Change.of(b'{"mode": "toy"}')


def test_a_new_row_is_a_mode_of_the_server(toy: str, scores: Scores) -> None:
    assert toy in choices() and Change.of(b'{"mode": "toy", "lambda": 0.5}').mode == toy
    options = config.CorConfig.of({"scores": "x", "mode": toy, "lambda": 0.5})
    for row, layer in enumerate(config.plan(options, scores).values()):
        assert layer.top_k == scores.config.model.top_k and layer.lambda_ == 0.5
        assert layer.bias is not None
        inverted = 0.5 * (1 - scores.cei[row])
        torch.testing.assert_close(layer.bias, inverted - inverted.min())


def test_a_new_row_is_held_out_and_tuned(toy: str, model: MoeModel, scores: Scores) -> None:
    sequences = torch.randint(0, 512, (4, 20), generator=torch.Generator().manual_seed(1)).tolist()
    tables = heldout.Tables(scores.k.tolist(), scores.cei)
    report = heldout.check(model, sequences, tables, 0.5, 90, 0)
    assert set(report.modes) == {"stock", *MODES} - {"off"} and toy in report.modes
    assert report.modes[toy].all.difference not in (0.0, report.modes["expert"].all.difference)
    _, candidates = heldout.tune(model, sequences, tables, 0)
    assert sum(candidate.mode == toy for candidate in candidates) == 5


def test_a_new_row_is_a_condition(toy: str, model: MoeModel, scores: Scores) -> None:
    row = next(row for row in conditions({"lambda": 0.5}) if row.name == toy)
    assert row.options == {"mode": toy, "lambda": 0.5} and row.description == MODES[toy].description
    ids = routed(model, scores, row.options).rules[0](LOGITS)[1].long()
    wanted = (LOGITS.softmax(-1) - 0.5 * scores.cei[0]).topk(3).indices
    assert torch.equal(ids.sort().values, wanted.sort().values)
    assert f"{toy}-lambda0.1" in {row.name for row in grid_conditions([0.1])}


def test_the_table_is_ordered_from_stock_to_the_method_to_controls() -> None:
    own = ["off", "layer", "expert", "full", "random"]  # there may be others
    assert [name for name in by_size() if name in own] == own
    assert [name for name in MODES if MODES[name].is_stock] == ["off"]


def test_a_random_mode_draws_the_same_experts_in_server_and_calibrator(
    model: MoeModel, scores: Scores
) -> None:
    """One draw, by the token's own logits and the layer; the server's is tests/parity/test_parity.py's."""
    tables = heldout.Tables(scores.k.tolist(), scores.cei)
    calibrator = heldout.rules(model, tables, "random", 0.1, 3)
    evaluation = routed(model, scores, {"mode": "random", "seed": 3}).rules
    layers = config.plan(config.CorConfig(scores="x", mode="random", seed=3), scores)
    for row, (index, layer) in enumerate(layers.items()):
        assert layer.random and layer.seed == 3 + index
        wanted = random_scores(LOGITS, 3 + index).topk(layer.top_k).indices
        for rule in (calibrator[row], evaluation[row], rule_of(model.routers[row], layer)):
            assert torch.equal(rule(LOGITS)[1].long(), wanted)


def test_a_setting_without_lambda_has_no_bias() -> None:
    cei = torch.tensor([[0.0, 1.0, 0.5]])
    tables = Tables([4], 2, [1], cei)
    own = ("full", "layer", "expert", "random", "off")
    found = {mode: plan(Setting(mode=mode, lambda_=0.5), tables)[0] for mode in own}
    assert {mode: layer.top_k for mode, layer in found.items()} == {
        "full": 1, "layer": 1, "expert": 2, "random": 1, "off": 2,
    }  # fmt: skip
    assert {mode for mode, layer in found.items() if layer.bias is not None} == {"full", "expert"}
    assert {mode for mode, layer in found.items() if layer.lambda_} == {"full", "expert"}
    assert found["off"].layer_index == 4 and isinstance(found["off"], LayerRouting)
