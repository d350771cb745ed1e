"""Conditions on a transformers model: what they route, and that the harness's scores follow."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.evaluate import acts
from cor_vllm.evaluate.benchmarks import BENCHMARKS, EvaluationError
from cor_vllm.evaluate.conditions import Condition, Sources
from cor_vllm.evaluate.dola import dola
from cor_vllm.evaluate.harness import canary, transformers_model
from cor_vllm.evaluate.interventions import Interventions
from cor_vllm.evaluate.routing import entropy, gated_by_output, gates, routed
from cor_vllm.scores import Scores
from cor_vllm.testing.tiny_models import byte_tokenizer, create

IDS = torch.tensor([[5, 9, 2, 77, 31, 8, 100, 4]])


@pytest.fixture(scope="module")
def model() -> MoeModel:
    return MoeModel(create("qwen3_moe"))


def logits(model: MoeModel, rules: Any) -> torch.Tensor:
    with model.routing(rules), torch.inference_mode():
        return model.model(IDS).logits


def test_off_and_a_zero_bias_are_the_models_own_routing(model: MoeModel, scores: Scores) -> None:
    stock = logits(model, {})
    for options in ({"mode": "off"}, {"mode": "expert", "lambda": 0.0}, {"static_k": 3}):
        found = routed(model, scores, options)
        assert torch.equal(logits(model, found.rules), stock), options
        assert found.slots.share == 0 and found.slots.total == 8 * 9
        assert found.activations == 9


def test_modes_change_what_they_should(model: MoeModel, scores: Scores) -> None:
    stock = logits(model, {})
    for options, total in (
        ({"mode": "expert", "lambda": 0.2}, 9),
        ({"mode": "layer"}, 9),
        ({"mode": "full", "lambda": 0.2, "weights": "fused"}, 9),
        ({"mode": "random"}, 9),
        ({"static_k": 5}, 15),
    ):
        found = routed(model, scores, options)
        assert not torch.allclose(logits(model, found.rules), stock), options
        assert found.activations == total
        assert found.slots.total == 8 * total


def test_slots_changed_are_counted(model: MoeModel, scores: Scores) -> None:
    found = routed(model, scores, {"mode": "expert", "lambda": 100.0})
    rule, router = found.rules[0], model.routers[0]
    router_logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    chosen = rule(router_logits)[1]
    wanted = scores.cei[0].topk(3).indices
    assert torch.equal(chosen.long().sort(dim=1).values, wanted.sort().values.expand(50, 3))
    own = router.route(router_logits)[1]
    kept = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(chosen, own, strict=True))
    assert found.slots.changed == 150 - kept


def test_the_router_gate_leaves_certain_tokens_alone(model: MoeModel, scores: Scores) -> None:
    options = {"mode": "expert", "lambda": 0.5}
    open_, shut = ([value] * 3 for value in (-1.0, 100.0))
    always = routed(model, scores, options)
    stock = logits(model, {})
    assert torch.equal(
        logits(model, routed(model, scores, options, thresholds=open_).rules), logits(model, always.rules)
    )
    assert torch.equal(logits(model, routed(model, scores, options, thresholds=shut).rules), stock)
    rule = routed(model, scores, options, thresholds=[1.5] * 3).rules[0]
    router_logits = torch.tensor([[9.0, 0, 0, 0, 0, 0, 0], [0.1, 0, 0, 0, 0, 0, 0]])
    ids = rule(router_logits)[1]
    assert ids[0].tolist() == model.routers[0].route(router_logits)[1][0].tolist()
    assert ids[1].tolist() == always.rules[0](router_logits)[1][1].tolist() != [0, 1, 2]


def test_the_output_gate_is_open_where_the_output_is_uncertain(model: MoeModel, scores: Scores) -> None:
    rules = routed(model, scores, {"mode": "expert", "lambda": 0.5}).rules

    def call(ids: torch.Tensor) -> torch.Tensor:
        return model.model(ids).logits

    with torch.inference_mode():
        stock, changed = call(IDS), logits(model, rules)
        assert torch.equal(gated_by_output(model, rules, 100.0, call)(IDS), stock)
        assert torch.equal(gated_by_output(model, rules, -1.0, call)(IDS), changed)
        uncertain = entropy(stock.softmax(dim=-1))
        threshold = uncertain[0].median().item()
        some = gated_by_output(model, rules, threshold, call)(IDS)
        first = int((uncertain[0] > threshold).nonzero()[0])
        assert torch.equal(some[:, :first], stock[:, :first])
        assert not torch.allclose(some[:, first], stock[:, first])


def test_gates_are_medians(model: MoeModel) -> None:
    found = gates(model, IDS.tolist())
    with model.record_router_logits() as records, torch.inference_mode():
        output = model.model(IDS).logits
    own = entropy(model.routers[1].probabilities(records[1][0]))
    assert found.router[1] == pytest.approx(own.double().quantile(0.5).item())
    assert found.output == pytest.approx(
        entropy(output.float().softmax(dim=-1)).double().quantile(0.5).item()
    )


def test_the_harness_sees_the_routing(model: MoeModel, scores: Scores) -> None:
    from lm_eval.api.instance import Instance

    lm = transformers_model(model, byte_tokenizer(), batch_size=2)
    canary(lm, "tiny")
    request = [Instance("loglikelihood", {}, ("abc", "de"), 0)]

    def value() -> float:
        return lm.loglikelihood(request, disable_tqdm=True)[0][0]

    stock = value()
    with model.routing(routed(model, scores, {"mode": "expert", "lambda": 0.5}).rules):
        assert value() != stock
    assert value() == stock
    ids = torch.tensor([byte_tokenizer()("abcde").input_ids])
    assert stock == pytest.approx(-model.losses(ids)[0, -2:].sum().item(), abs=1e-4)
    lm.forward = lambda ids: torch.zeros(*ids.shape, 512)
    assert value() == pytest.approx(-2 * torch.tensor(512.0).log().item())


class Deaf:
    """A server that answers without the prompt's log-probabilities: the harness then sums over nothing."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool) -> list[tuple[float, bool]]:
        if not self.values:
            raise KeyError("logprobs")
        return [(value, True) for value in self.values]


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1.0, -1.0], [float("nan"), -1.0], []])
def test_the_canary_refuses_a_model_without_log_likelihoods(values: list[float]) -> None:
    with pytest.raises(EvaluationError, match=r"server standard.*echo and logprobs"):
        canary(Deaf(values), "server standard")


def test_scores_of_another_model_are_refused(scores: Scores, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 MoE layers for a model of 2"):
        routed(MoeModel(create("qwen2_moe")), scores, {"mode": "full"})


@pytest.mark.parametrize(
    ("task", "generates", "layer", "options"),
    [
        ("truthfulqa_mc1", False, 2, {"relative_top": 0.0, "post_softmax": False}),
        ("triviaqa", True, 2, {}),
        ("factor_news", False, 0, {}),
        ("gsm8k", True, 0, {}),
    ],
)
def test_dola_takes_its_authors_settings_for_the_benchmark(
    model: MoeModel, scores: Scores, task: str, generates: bool, layer: int, options: dict[str, Any]
) -> None:
    lm = transformers_model(model, byte_tokenizer(), 2)
    condition = Condition("dola", "DoLa", act=acts.dola)
    interventions = Interventions(model, byte_tokenizer(), None, 0)
    with (
        interventions.applied(condition, Sources({"": scores}), lm),
        lm.around(BENCHMARKS[task], generates),
    ):
        found = lm._model_call(IDS)
        ((likelihood, _),) = lm._loglikelihood_tokens([(("", ""), IDS[0, :5].tolist(), IDS[0, 5:].tolist())])
    assert lm.around is None and not lm.final
    with dola(model.model, [layer], **options), torch.no_grad():
        expected = model.model(IDS).logits
    assert torch.equal(found.as_subclass(torch.Tensor), expected)
    told = expected[0, 4:7].gather(1, IDS[0, 5:, None]).sum().item()
    assert likelihood == pytest.approx(told, abs=1e-4), "summed as they are"
