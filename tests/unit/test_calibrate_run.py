"""A whole calibration on a tiny model: what the file holds, and which option changes what in it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from rich.console import Console

from cor_vllm import scores as scores_file
from cor_vllm.budget import allocate, allocate_paper
from cor_vllm.calibrate.config import CalibrationOptions
from cor_vllm.calibrate.interventions import state
from cor_vllm.calibrate.interventions.measurement import baseline
from cor_vllm.calibrate.interventions.sweep import Sweep
from cor_vllm.calibrate.model.loading import load_model
from cor_vllm.calibrate.pipeline import calibrate
from cor_vllm.calibrate.result import assemble as result_module
from cor_vllm.calibrate.result.allocation import move_units
from cor_vllm.calibrate.result.heldout import Tables, check
from cor_vllm.calibrate.text.inputs import read_inputs
from cor_vllm.calibrate.text.stratify import stratify
from cor_vllm.fingerprint import read_routers
from cor_vllm.scores import SWAP_RATE_LAMBDAS
from cor_vllm.testing import tiny_models

SMALL: dict[str, Any] = {"num_tokens": 60, "seq_len": 24, "heldout_tokens": 40}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("deepseek_v2", tmp_path_factory.mktemp("models") / "tiny-deepseek")


@pytest.fixture(scope="module")
def result(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("result") / "scores.safetensors"
    calibrate(options(checkpoint, output), QUIET)
    return output


def options(model: Path, output: Path, **values: Any) -> CalibrationOptions:
    return CalibrationOptions(model=str(model), output=output, **(SMALL | values))


def test_the_file_says_what_was_done(result: Path, checkpoint: Path) -> None:
    scores = scores_file.load(result)
    config = scores.config
    assert config.model.name == "tiny-deepseek" and config.model.revision is None
    assert config.model.architecture == "DeepseekV2ForCausalLM"
    assert (config.model.num_experts, config.model.top_k, config.model.num_hidden_layers) == (6, 2, 3)
    assert config.model.fingerprint == read_routers(checkpoint).fingerprint
    assert config.model.routers == list(read_routers(checkpoint).info)
    assert scores.layer_index.tolist() == [1, 2]
    assert config.budget.model_dump() == {"rule": "exact", "k_min": 1, "k_max": 4, "total": 4, "sum": 4}
    assert config.serving.model_dump(by_alias=True) == {"lambda": 0.1, "mode": "full"}
    assert set(config.versions) == {"cor-vllm", "torch", "transformers"}
    recorded = config.calibration.model_dump()
    for name in CalibrationOptions.model_fields.keys() - {"model", "output", "resume", "cor_router"}:
        assert name in recorded, f"option {name} is not in the file"
    assert (recorded["corpus"], recorded["dtype"], recorded["device"]) == ("default", "float32", "cpu")
    assert (recorded["num_positions"], recorded["num_hard"], recorded["num_easy"]) == (60, 6, 6)
    assert not state.partial_path(result).exists()


def test_the_numbers_are_those_of_the_measurements(result: Path, checkpoint: Path) -> None:
    """Every tensor again, from single measurements, by hand."""
    scores = scores_file.load(result)
    chosen = options(checkpoint, result)
    model = load_model(checkpoint, "auto", "cpu")
    inputs = read_inputs(chosen, checkpoint, model.config.vocab_size)
    base = baseline(model, inputs.sequences)
    strata = stratify(base.losses, 90, 10)
    algorithm = Sweep(model, chosen, inputs.sequences, base, strata)
    for step in range(len(algorithm.work())):
        algorithm.step(step)
    assert scores.config.calibration.tau_high == strata.tau_high
    for m, measured in enumerate(algorithm.result()):
        hard, easy = measured.hard.mean().item(), measured.easy.mean().item()
        assert scores.sensitivity_hard[m].item() == pytest.approx(hard, rel=1e-6)
        assert scores.sensitivity_easy[m].item() == pytest.approx(easy, rel=1e-6)
        assert scores.rki[m].item() == pytest.approx(hard / (easy + 1e-6), rel=1e-5)
        for expert in range(6):
            own = measured.ablation[measured.active == expert]
            assert scores.cei_count[m, expert] == len(own)
            if len(own):
                assert scores.cei_raw[m, expert].item() == pytest.approx(own.mean().item(), rel=1e-5)
        raw = scores.cei_raw[m]
        torch.testing.assert_close(scores.cei[m], (raw - raw.min()) / (raw.max() - raw.min()))
        probs = base.router_logits[m].softmax(-1)
        torch.testing.assert_close(scores.router_prob[m], probs[strata.hard].mean(0))
        stock = probs.topk(2).indices
        for column, lam in enumerate(SWAP_RATE_LAMBDAS):
            routed = (probs + lam * scores.cei[m]).topk(2).indices
            swapped = sum(len(set(a) - set(b)) for a, b in zip(stock.tolist(), routed.tolist(), strict=True))
            assert scores.swap_rate[m, column].item() == pytest.approx(swapped / (2 * 60))


def test_heldout_check_by_hand(result: Path, checkpoint: Path) -> None:
    scores = scores_file.load(result)
    heldout = scores.config.heldout
    assert heldout is not None and (heldout.positions, heldout.hard_positions) == (40, 4)
    assert list(heldout.modes) == ["stock", "layer", "expert", "full", "random"]
    model = load_model(checkpoint, "auto", "cpu")
    sequences = read_inputs(options(checkpoint, result), checkpoint, 512).heldout

    def losses(k: list[int], lam: float) -> torch.Tensor:
        def rule(m: int) -> Any:
            def route(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                probs = logits.softmax(-1)
                ids = (probs + lam * scores.cei[m]).topk(k[m]).indices
                return 1.5 * probs.gather(1, ids), ids

            return route

        with model.routing({m: rule(m) for m in range(2)}):
            return torch.cat([model.losses(torch.tensor([ids]))[0] for ids in sequences]).double()

    stock = losses([2, 2], 0.0)
    hard = stock > torch.quantile(stock, 0.9)
    for mode, values in {
        "layer": losses(scores.k.tolist(), 0.0),
        "expert": losses([2, 2], 0.1),
        "full": losses(scores.k.tolist(), 0.1),
    }.items():
        for stat, rows in ((heldout.modes[mode].all, hard | True), (heldout.modes[mode].hard, hard)):
            change = (values - stock)[rows]
            assert stat.mean == pytest.approx(values[rows].mean().item(), abs=1e-5)
            assert stat.difference == pytest.approx(change.mean().item(), abs=1e-5)
            assert stat.sem == pytest.approx(change.std().item() / len(change) ** 0.5, abs=1e-5)


def test_alternatives_are_what_their_flags_give(result: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Each setting's difference again from a file calibrated with its flag, or from the modes' own means."""
    scores = scores_file.load(result)
    heldout = scores.config.heldout
    assert heldout is not None
    trials = {trial.flags: trial.difference for trial in heldout.alternatives}
    assert set(trials) == {
        "--cor-mode off", "--cor-mode layer", "--cor-mode expert", "--cor-lambda 0.01", "--cor-lambda 0.02",
        "--cor-lambda 0.05", "--shrink", "--intensity ratio", "--intensity hard",
    }  # fmt: skip
    full = heldout.modes["full"].all.mean
    for mode, name in (("off", "stock"), ("layer", "layer"), ("expert", "expert")):
        assert trials[f"--cor-mode {mode}"] == pytest.approx(heldout.modes[name].all.mean - full, abs=1e-5)
    flags: dict[str, dict[str, Any]] = {
        "--shrink": {"shrink": True},
        "--intensity ratio": {"intensity": "ratio"},
        "--intensity hard": {"intensity": "hard"},
    }
    for flag, values in flags.items():
        other = calibrate(options(checkpoint, tmp_path / "s", **values), QUIET).config.heldout
        assert other is not None
        assert trials[flag] == pytest.approx(other.modes["full"].all.mean - full, abs=1e-5)


@pytest.mark.parametrize("intensity", ["marginal", "ratio"])
def test_every_key_that_a_file_is_given_is_declared(checkpoint: Path, tmp_path: Path, intensity: str) -> None:
    made = options(checkpoint, tmp_path / "s", tune=True, intensity=intensity)
    written = calibrate(made, QUIET).config
    read = scores_file.load(tmp_path / "s").config
    assert read == written
    sections = [read]
    for section in sections:
        assert not section.model_extra, type(section).__name__
        values = [getattr(section, name) for name in type(section).model_fields]
        values += [each for value in values if isinstance(value, list) for each in value]
        values += [each for value in values if isinstance(value, dict) for each in value.values()]
        sections += [value for value in values if isinstance(value, BaseModel)]
    assert len({type(section) for section in sections}) > 10
    recorded = made.record().keys()
    assert recorded <= read.calibration.model_fields_set
    assert ("marginal" in read.model_dump()["calibration"]) == (intensity == "marginal")


def test_no_heldout_check_on_request(checkpoint: Path, tmp_path: Path) -> None:
    scores = calibrate(options(checkpoint, tmp_path / "s", heldout_tokens=0), QUIET)
    assert scores.config.heldout is None


def test_tune_takes_the_best_setting_and_reports_on_the_other_half(checkpoint: Path, tmp_path: Path) -> None:
    scores = calibrate(options(checkpoint, tmp_path / "s", tune=True), QUIET)
    heldout = scores.config.heldout
    assert heldout is not None and heldout.tuning is not None
    trials = {(trial.mode, trial.lambda_): trial.difference for trial in heldout.tuning.trials}
    assert (heldout.positions, heldout.tuning.positions) == (20, 20)
    assert len(trials) == 2 + 2 * len(SWAP_RATE_LAMBDAS) and trials["off", 0.0] == 0.0
    best = min(trials, key=lambda key: trials[key])
    assert (scores.config.serving.mode, scores.config.serving.lambda_) == best
    # The reported `full` is the one with the tuned λ, on the other half.
    model = load_model(checkpoint, "auto", "cpu")
    inputs = read_inputs(options(checkpoint, tmp_path / "s", tune=True), checkpoint, 512)
    tables = Tables(scores.k.tolist(), scores.cei)
    again = check(model, inputs.heldout, tables, best[1] or 0.1, 90, 0)
    assert again.modes["full"] == heldout.modes["full"]


@pytest.mark.parametrize("intensity", ["ratio", "hard"])
def test_the_intensity_decides_the_budget(
    checkpoint: Path, tmp_path: Path, intensity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    budget = result_module.budget

    def recording(chosen: Any, num_experts: int, top_k: int, values: list[float], *rest: Any) -> Any:
        seen.append(values)
        return budget(chosen, num_experts, top_k, values, *rest)

    monkeypatch.setattr(result_module, "budget", recording)
    scores = calibrate(options(checkpoint, tmp_path / "s", heldout_tokens=0, intensity=intensity), QUIET)
    expected = scores.rki if intensity == "ratio" else scores.sensitivity_hard
    assert seen[0] == pytest.approx(expected.tolist(), rel=1e-5)
    assert scores.k.tolist() == allocate(seen[0], 4, 1, 4)


def test_marginal_budget(checkpoint: Path, tmp_path: Path) -> None:
    scores = calibrate(options(checkpoint, tmp_path / "s", heldout_tokens=0, intensity="marginal"), QUIET)
    assert scores.k.sum() == scores.config.budget.sum == 4
    marginal = scores.config.calibration.marginal
    assert marginal is not None
    pairs = [(layer.fewer, layer.more) for layer in marginal]
    assert scores.k.tolist() == move_units(pairs, 2, 1, 4)  # type: ignore[arg-type]


def test_paper_budget(checkpoint: Path, tmp_path: Path) -> None:
    scores = calibrate(options(checkpoint, tmp_path / "s", heldout_tokens=0, budget="paper"), QUIET)
    info = scores.config.budget
    assert (info.rule, info.k_min, info.k_max, info.total) == ("paper", 1, 6, 4)
    assert info.sum == scores.k.sum() and scores.k.tolist() == allocate_paper(scores.rki.tolist(), 4, 6)


def test_shrink_changes_cei_but_not_raw(checkpoint: Path, result: Path, tmp_path: Path) -> None:
    plain = scores_file.load(result)
    shrunk = calibrate(options(checkpoint, tmp_path / "s", heldout_tokens=0, shrink=True), QUIET)
    assert torch.equal(shrunk.cei_raw, plain.cei_raw)
    assert not torch.equal(shrunk.cei, plain.cei)


def test_given_ids_and_positions(checkpoint: Path, tmp_path: Path) -> None:
    sequences = torch.randint(0, 512, (3, 9), generator=torch.Generator().manual_seed(1)).tolist()
    ids, positions = tmp_path / "ids.json", tmp_path / "positions.json"
    ids.write_text(json.dumps(sequences))
    positions.write_text("[[7], [], [0, 3]]")
    scores = calibrate(options(checkpoint, tmp_path / "s", token_ids=ids, positions=positions), QUIET)
    info = scores.config.calibration
    assert (info.corpus, info.num_positions, info.num_hard) == ("ids.json", 24, 3)
    assert scores.cei_count.sum(dim=1).tolist() == [6, 6]
    assert scores.config.heldout is None


def test_answers(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps({"question": "Who?", "answer": "He"}))
    scores = calibrate(options(checkpoint, tmp_path / "s", answers=file, num_tokens=20), QUIET)
    info = scores.config.calibration
    assert (info.corpus, info.num_hard) == ("answers.jsonl", 3)
    assert scores.config.heldout is not None


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_sweep_and_plain_write_the_same_tensors(family: str, tmp_path: Path) -> None:
    """Within 1e-5, relative, plus what 5e-6 nats in every single loss come to in each tensor."""
    folder = tiny_models.build(family, tmp_path / "m")
    values = {"intensity": "marginal", "heldout_tokens": 0}
    sweep, plain = (
        calibrate(options(folder, tmp_path / algorithm, algorithm=algorithm, **values), QUIET)
        for algorithm in ("sweep", "plain")
    )
    nats = 5e-6
    spread = plain.cei_raw.max(dim=1).values - plain.cei_raw.min(dim=1).values
    hard, easy = plain.sensitivity_hard.abs(), plain.sensitivity_easy.abs()
    floors = {
        "cei": 2 * nats / spread[:, None],
        "rki": plain.rki.abs() * (nats / hard + nats / (easy - nats)),
        **dict.fromkeys(("cei_raw", "cei_sem", "sensitivity_hard", "sensitivity_easy"), nats),
    }
    assert (floors["cei"] < 1e-3).all() and easy.min() > nats, "or the comparison shows nothing"
    for name in [field.name for field in dataclasses.fields(plain) if field.name != "config"]:
        one, other = getattr(sweep, name).double(), getattr(plain, name).double()
        allowed = 1e-5 * other.abs() + floors.get(name, 0.0)
        assert ((one - other).abs() <= allowed).all(), name
    record, expected = sweep.config.calibration.model_dump(), plain.config.calibration.model_dump()
    assert (record.pop("algorithm"), expected.pop("algorithm")) == ("sweep", "plain")
    assert record["num_hard"] == expected["num_hard"] and record["tau_high"] == expected["tau_high"]
