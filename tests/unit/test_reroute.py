"""The update of the last router: on a planted misrouting, under wrong labels, and on natural text."""

import json
from pathlib import Path

import pytest
import torch

from cor_vllm import overlay
from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.model.router import Router
from cor_vllm.calibrate.reroute import objectives, pipeline
from cor_vllm.calibrate.reroute.judgement import diagnostics, heldout, in_bin
from cor_vllm.calibrate.reroute.options import RerouteOptions
from cor_vllm.calibrate.reroute.parts import split
from cor_vllm.calibrate.reroute.pipeline import reroute
from cor_vllm.calibrate.reroute.problem import Problem
from cor_vllm.calibrate.reroute.training import Candidate, Training, TrainingOptions, find_pairs
from cor_vllm.calibrate.routes.standard import ScoredText
from cor_vllm.cli import main
from cor_vllm.commands.console import Terminal
from cor_vllm.kernels.scoring import Scoring
from cor_vllm.testing import tiny_models
from tests.planted import EXPERTS, PLANTED, planted

DEMO = Path(__file__).parents[2] / "examples/demo"
TRAIN, TEST = torch.arange(6000), torch.arange(6000, 8000)
FAST = Candidate("epo", 3e-3)
LONG = TrainingOptions(epochs=4)


# ---- what no gradient says (why the update needs other routes at all)


def gradient(problem: Problem, row: int) -> torch.Tensor:
    """[N] the gradient of one token's loss by its router logits."""
    z = problem.logits(problem.weight, torch.tensor([row])).detach().requires_grad_()
    weights, ids = problem.router.route(z)
    problem.losses(torch.tensor([row]), ids.long(), weights).sum().backward()
    assert z.grad is not None
    return z.grad[0]


@pytest.mark.parametrize("renormalise", [True, False])
def test_no_gradient_depends_on_an_expert_that_was_not_executed(renormalise):
    problem, _ = planted(20)
    router = Router(2, Scoring("softmax", renormalise, correction_bias=torch.zeros(EXPERTS)))
    vars(problem)["router"] = router
    executed = router.route(problem.logits(problem.weight, torch.tensor([7])))[1][0].tolist()
    others = [e for e in range(EXPERTS) if e not in executed]
    before = gradient(problem, 7)
    problem.last.experts[others[0]] += 1.0
    assert torch.equal(gradient(problem, 7), before)
    # With renormalised weights it is 0; else an expert's own probability times what all executed ones got.
    probs = router.probabilities(problem.logits(problem.weight, torch.tensor([7])))[0]
    expected = torch.zeros(len(others))
    if not renormalise:
        expected = -probs[others] * before[executed].sum() / (1 - probs[executed].sum())
    assert torch.allclose(before[others], expected, atol=1e-6, rtol=1e-4)
    assert before[executed].abs().max() > 1e-3


# ---- objectives


def test_preference_counts_only_the_experts_that_the_routes_do_not_share():
    z, before = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    better, worse = torch.tensor([[0, 1, 4]] * 5), torch.tensor([[0, 2, 3]] * 5)
    found = objectives.preference(z, before, better, worse)

    def log_ratio(routes: torch.Tensor) -> torch.Tensor:
        return (z.log_softmax(1) - before.log_softmax(1)).gather(1, routes).sum(1)

    assert torch.allclose(found, log_ratio(better) - log_ratio(worse), atol=1e-5)
    z[:, [0, 5]] += 7.0  # in both, in none
    assert torch.allclose(objectives.preference(z, before, better, worse), found, atol=1e-5)


def test_the_margin_is_what_execution_needs():
    """Below log 2 a token's router takes just the better route."""
    gain = torch.ones(1)
    z = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    executed, other = torch.tensor([[1, 0]]), torch.tensor([[0, 2]])
    assert objectives.margin(z, executed, gain) < 0.6931 < objectives.margin(z, other, gain)


def test_divergence_is_zero_for_the_same_logits_alone():
    z = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    assert objectives.divergence(z + 3.0, z).item() == pytest.approx(0, abs=1e-6)
    assert objectives.divergence(z * 2, z) > 0.01


# ---- the planted misrouting


@pytest.fixture(scope="module")
def fixture() -> tuple[Problem, torch.Tensor]:
    return planted(8000)


def outcome(problem: Problem, classes: torch.Tensor, weight: torch.Tensor) -> dict[str, float]:
    """On the test tokens: how often the right expert runs, and loss changes."""
    base = problem.executed(problem.weight, TEST)[1]
    ids, losses = problem.executed(weight, TEST)
    right = (ids == classes[TEST, None]).any(dim=1).double()
    misrouted, change = classes[TEST] < PLANTED, losses - base
    return {
        "right": right[misrouted].mean().item(),
        "others right": right[~misrouted].mean().item(),
        "change": change[misrouted].mean().item(),
        "confident": change[in_bin("confident", base.neg().exp())].mean().item(),
    }


def test_epo_finds_the_right_experts(fixture):
    problem, classes = fixture
    trained = Training(problem, TRAIN, TEST, FAST, LONG).run()
    found = outcome(problem, classes, trained.weight)
    assert found["right"] >= 0.8 and found["others right"] > 0.98
    assert found["change"] < -2 and found["confident"] <= 0.02
    figures = diagnostics(problem, trained.weight, TEST, LONG)
    assert figures["preference_accuracy"] > 0.5 and figures["overlap"] > figures["overlap_before"]
    table = heldout(problem, trained.weight, TEST, 1e-6, 0)
    assert table["all"].high is not None and table["all"].high < 0


def test_the_usual_gradient_never_reaches_the_right_experts(fixture):
    """`ce` lowers the loss by other weights of the experts that run, and executes the right one no more."""
    problem, classes = fixture
    trained = Training(problem, TRAIN, TEST, Candidate("ce", 3e-3), LONG).run()
    found = outcome(problem, classes, trained.weight)
    assert found["change"] < -0.5 and found["right"] <= 0.1


def test_the_published_rate_moves_little_in_one_epoch(fixture):
    problem, classes = fixture
    trained = Training(problem, TRAIN, TEST, Candidate("epo", 3e-4), TrainingOptions()).run()
    assert -0.5 < outcome(problem, classes, trained.weight)["change"] < 0


def test_debias_finds_the_planted_misrouting_too(fixture):
    problem, classes = fixture
    options = TrainingOptions(epochs=4, debias=True)
    trained = Training(problem, TRAIN, TEST, FAST, options).run()
    assert outcome(problem, classes, trained.weight)["right"] >= 0.8
    # Without a misrouting, gains over the draw's luck are rare.
    sound, _ = planted(2000, swapped=False)
    plain, debiased = (
        find_pairs(sound, sound.weight, torch.arange(2000), TrainingOptions(tau=0.0, debias=d))
        for d in (False, True)
    )
    assert len(debiased) < len(plain)


def test_wrong_labels_never_make_confident_tokens_pay():
    """With 30 % random labels every objective would; what is kept must not."""
    problem, _ = planted(8000, wrong_labels=0.3)
    tuning, judging = TEST[:1000], TEST[1000:]
    for candidate in (FAST, Candidate("margin", 3e-3), Candidate("ce", 3e-3), Candidate("epo", 3e-3, 0.1)):
        trained = Training(problem, TRAIN, tuning, candidate, LONG).run()
        confident = heldout(problem, trained.weight, judging, 1e-6, 0)["confident"]
        assert confident.change is not None and confident.change <= 0.03
        assert trained.change <= 0


def test_pairs_are_better_routes_of_hard_tokens(fixture):
    problem, _ = fixture
    rows = torch.arange(500)
    pairs = find_pairs(problem, problem.weight, rows, TrainingOptions())
    ids, losses = problem.executed(problem.weight, rows)
    assert 0 < len(pairs) < 500 and (losses[pairs.rows] > 0.1).all()
    assert torch.equal(pairs.worse, ids[pairs.rows])
    probs = problem.router.probabilities(problem.logits(problem.weight, pairs.rows)).gather(1, pairs.better)
    better = problem.losses(pairs.rows, pairs.better, probs / probs.sum(1, keepdim=True))
    assert torch.allclose(losses[pairs.rows] - better, pairs.gain, atol=1e-5)
    assert (pairs.gain > 0).all()


# ---- parts


def test_equal_documents_are_never_in_two_parts():
    sequences = [[i % 50, 1, 2] for i in range(200)]
    text = ScoredText("t", "0" * 64, sequences, [[0, 1]] * 200, list(range(200)))
    documents = torch.arange(200).repeat_interleave(2)
    parts = split(text, documents, seed=0)
    seen = [{sequences[d][0] for d in documents[rows].tolist()} for rows in vars(parts).values()]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert sum(map(len, vars(parts).values())) == len(documents)
    assert [len(s) for s in seen] == [20, 15, 15], (
        "as many for the report as an interval needs, but 30 % at most"
    )
    again = split(text, documents, seed=1)
    assert not torch.equal(again.report, parts.report)


def test_two_documents_are_too_few():
    text = ScoredText("t", "0" * 64, [[1, 2], [3, 4], [1, 2]], [[0]] * 3, [0, 1, 2])
    with pytest.raises(CalibrationError, match="has 2 different documents"):
        split(text, torch.arange(3), seed=0)


# ---- the command's pipeline


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Options for a tiny random model and random text, on which nothing can be learnt."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.build("qwen3_moe", folder / "model")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(256, (60, 12), generator=generator).tolist()
    (folder / "ids.json").write_text(json.dumps(rows))
    return {
        "model": str(folder / "model"), "token_ids": folder / "ids.json", "routes": 4,
        "learning_rate": 3e-4, "kl": 0.0,
    }  # fmt: skip


def run(output: Path, tiny: dict[str, object], **more: object) -> overlay.RouterOverlay:
    options = RerouteOptions(output=output, **{**tiny, **more})
    return reroute(options, Terminal(quiet=True))


def test_the_file_says_what_was_done(tmp_path, tiny):
    result = run(tmp_path / "r.safetensors", tiny)
    stored = overlay.load(tmp_path / "r.safetensors")
    assert torch.equal(stored.router_weight, result.router_weight)
    config = stored.config
    assert stored.layer == 2 and config.dtype == "bfloat16", "as vLLM serves a float32 checkpoint"
    assert config.model.num_experts == 7 and config.heldout["all"].documents == 18
    assert config.harm(), "fewer than 20 documents prove nothing"
    assert config.diagnostics["pairs"] > 0
    assert not list(tmp_path.glob("*.partial"))


def test_a_trained_weight_comes_with_a_random_one_of_equal_size(tmp_path, tiny, monkeypatch):
    """Which is forced here: the tuning part is told that the trained weight helped."""
    original = Training.run

    def helped(self):
        trained = original(self)
        weight = (self._problem.weight + 0.05).bfloat16().float()
        return type(trained)(weight, 10, -1.0)

    monkeypatch.setattr(Training, "run", helped)
    config = run(tmp_path / "r.safetensors", tiny, objective="epo").config
    assert config.training.objective == "epo" and config.drift > 0
    assert {"random_change", "random_overlap", "random_changed"} <= config.diagnostics.keys()


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, tiny, monkeypatch):
    run(tmp_path / "whole.safetensors", tiny)
    original, calls = Training.run, []

    def interrupted(self):
        calls.append(str(self._candidate))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Training, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "again.safetensors", tiny)
    assert (tmp_path / "again.safetensors.partial").exists()
    run(tmp_path / "again.safetensors", tiny)
    assert len(calls) == 4 and calls[2] == calls[3], "only what was not done is done again"
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_the_same_options_give_the_same_bytes_with_less_memory(tmp_path, tiny):
    run(tmp_path / "a.safetensors", tiny, objective="ce")
    run(tmp_path / "b.safetensors", tiny, objective="ce", max_memory=1)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_dense_last_layer_is_refused(tmp_path, tiny):
    tiny_models.build("qwen2_moe", tmp_path / "model", mlp_only_layers=[2])
    with pytest.raises(CalibrationError, match="the last decoder layer has no experts"):
        run(tmp_path / "r.safetensors", tiny, model=str(tmp_path / "model"))


@pytest.mark.parametrize("family", [f for f in tiny_models.FAMILIES if f != "qwen3_moe"])
def test_every_family_can_be_trained(tmp_path, tiny, family):
    """A changed weight changes what the problem executes, and W₀ is what the model does."""
    tiny_models.build(family, tmp_path / "model")
    found = {}
    original = pipeline.read_problem

    def kept(*args):
        found["problem"], epsilon = original(*args)
        return found["problem"], epsilon

    pipeline.read_problem = kept
    try:
        result = run(tmp_path / "r.safetensors", tiny, model=str(tmp_path / "model"), objective="margin")
    finally:
        pipeline.read_problem = original
    assert result.config.diagnostics["epsilon"] < 1e-4
    problem = found["problem"]
    every = torch.arange(len(problem))
    moved = problem.executed(problem.weight.flip(0), every)[0]
    assert (moved != problem.executed(problem.weight, every)[0]).any()


def test_on_natural_text_of_the_demo_model_the_report_shows_no_gain_of_epo(tmp_path):
    """Sampled regret is the luck of the draw there; the honest answer is a file that says so."""
    result = run(
        tmp_path / "r.safetensors", {}, model=str(DEMO / "model"), corpus=str(DEMO / "calibration.txt"),
        num_tokens=8000, objective="epo", routes=16,
    )  # fmt: skip
    assert result.config.heldout["all"].documents >= 20
    assert result.config.harm()


def test_the_command_prints_the_report_and_show_prints_it_again(tmp_path, tiny, capsys):
    out = str(tmp_path / "r.safetensors")
    arguments = ["--token-ids", str(tiny["token_ids"]), "--routes", "2", "--objective", "ce", "--output", out]
    assert main(["reroute", str(tiny["model"]), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "held-out loss" in printed and "--cor-router" in printed
    assert main(["show", out]) == 0
    assert "too few docs" in capsys.readouterr().out
    assert main(["show", out, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["layer"] == 2 and shown["harm"]
    assert main(["reroute", str(tiny["model"]), *arguments, "--kl", "-1"]) == 1
    assert "--kl: " in capsys.readouterr().err
