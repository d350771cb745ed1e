"""A whole calibration of a sigmoid router with groups: what the file holds, by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cor_vllm import scores as scores_file
from cor_vllm.calibrate.config import CalibrationError, CalibrationOptions
from cor_vllm.calibrate.interventions.measurement import baseline
from cor_vllm.calibrate.model.loading import load_model
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.pipeline import calibrate
from cor_vllm.calibrate.result.heldout import Tables, rules
from cor_vllm.calibrate.text.inputs import read_inputs
from cor_vllm.calibrate.text.stratify import stratify
from cor_vllm.scores import SWAP_RATE_LAMBDAS, Scores
from cor_vllm.testing import tiny_models

QUIET = Console(quiet=True)
TOP_K, ELIGIBLE, SCALE = 3, 8, 2.5  # 2 of 4 groups of 4 experts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("deepseek_v3", tmp_path_factory.mktemp("models") / "tiny-deepseek")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> MoeModel:
    return load_model(checkpoint, "auto", "cpu")


@pytest.fixture(scope="module")
def result(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    return calibrate(options(checkpoint, tmp_path_factory.mktemp("result") / "s"), QUIET)


def options(model: Path, output: Path, **values: Any) -> CalibrationOptions:
    small = {"num_tokens": 60, "seq_len": 24, "heldout_tokens": 40} | values
    return CalibrationOptions(model=str(model), output=output, **small)


def selected(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k experts of highest score in the two groups whose two best have the highest sums."""
    strength = scores.view(-1, 4, 4).topk(2).values.sum(-1)
    kept = torch.zeros_like(strength).scatter(1, strength.topk(2).indices, 1).bool()
    return scores.masked_fill(~kept.repeat_interleave(4, dim=1), -torch.inf).topk(k).indices


def corrections(model: MoeModel) -> list[torch.Tensor]:
    return [model.model.model.layers[index].mlp.gate.e_score_correction_bias for index in model.layer_index]


def test_router_probabilities_and_swap_rates(result: Scores, checkpoint: Path, model: MoeModel) -> None:
    inputs = read_inputs(options(checkpoint, Path("s")), checkpoint, tiny_models.VOCAB)
    base = baseline(model, inputs.sequences)
    hard = stratify(base.losses, 90, 10).hard
    for m, correction in enumerate(corrections(model)):
        g = base.router_logits[m].sigmoid()
        torch.testing.assert_close(result.router_prob[m], g[hard].mean(0))
        stock = selected(g + correction, TOP_K)
        for column, lam in enumerate(SWAP_RATE_LAMBDAS):
            routed = selected(g + correction + lam * result.cei[m], TOP_K)
            swapped = sum(len(set(a) - set(b)) for a, b in zip(stock.tolist(), routed.tolist(), strict=True))
            assert result.swap_rate[m, column].item() == pytest.approx(swapped / (TOP_K * 60))
    assert (result.swap_rate[:, -1] > 0).all(), "or the comparison shows nothing"


def test_heldout_check(result: Scores, checkpoint: Path, model: MoeModel) -> None:
    sequences = read_inputs(options(checkpoint, Path("s")), checkpoint, tiny_models.VOCAB).heldout

    def losses(k: list[int], lam: float) -> torch.Tensor:
        def rule(m: int, correction: torch.Tensor) -> Any:
            def route(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                g = logits.sigmoid()
                ids = selected(g + correction + lam * result.cei[m], k[m])
                weights = g.gather(1, ids)
                return SCALE * weights / weights.sum(-1, keepdim=True), ids

            return route

        with model.routing({m: rule(m, correction) for m, correction in enumerate(corrections(model))}):
            return torch.cat([model.losses(torch.tensor([ids]))[0] for ids in sequences]).double()

    heldout, own, budget = result.config.heldout, [TOP_K, TOP_K], result.k.tolist()
    assert heldout is not None
    for mode, values in {
        "stock": losses(own, 0.0),
        "layer": losses(budget, 0.0),
        "expert": losses(own, 0.1),
        "full": losses(budget, 0.1),
    }.items():
        assert heldout.modes[mode].all.mean == pytest.approx(values.mean().item(), abs=1e-5)
    assert heldout.modes["expert"].all.difference != 0.0


def test_random_experts_are_in_the_groups_that_their_scores_keep(model: MoeModel) -> None:
    tables = Tables([ELIGIBLE, TOP_K], torch.zeros(2, 16))
    ids = rules(model, tables, "random", 0.0, 7)[0](torch.randn(50, 16))[1]  # the draw depends on the logits
    chosen = torch.zeros(50, 16).scatter(1, ids.long(), 1).view(50, 4, 4)
    assert ((chosen.sum(-1) == 4).sum(-1) == 2).all()
    assert chosen.sum(0).min() > 0, "every group is kept for some token"


@pytest.mark.parametrize("values", [{}, {"budget": "paper"}, {"intensity": "marginal"}, {"tune": True}])
def test_no_layer_gets_more_experts_than_the_groups_kept_hold(
    checkpoint: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    scores = calibrate(options(checkpoint, tmp_path / "s", **values), QUIET)
    assert scores.config.budget.k_max == (ELIGIBLE if values.get("budget") == "paper" else 2 * TOP_K)
    assert scores.k.max() <= ELIGIBLE
    assert torch.equal(scores_file.load(tmp_path / "s").k, scores.k)


def test_k_max_beyond_the_groups_kept_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"--k-max 9 must .* not exceed the 8 experts that its router"):
        calibrate(options(checkpoint, tmp_path / "s", k_max=9), QUIET)
    scores = calibrate(options(checkpoint, tmp_path / "s", k_max=8, heldout_tokens=0), QUIET)
    assert scores.config.budget.k_max == 8


@pytest.mark.parametrize("algorithm", ["sweep", "plain"])
def test_more_experts_than_the_groups_kept_hold_are_not_measured(tmp_path: Path, algorithm: str) -> None:
    folder = tiny_models.build("deepseek_v3", tmp_path / "m", num_experts_per_tok=ELIGIBLE)
    values = {"intensity": "marginal", "heldout_tokens": 0, "algorithm": algorithm}
    scores = calibrate(options(folder, tmp_path / "s", **values), QUIET)
    marginal = scores.config.calibration.marginal
    assert marginal and all(layer.more is None and layer.fewer is not None for layer in marginal)
