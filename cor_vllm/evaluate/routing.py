"""A condition's routing on the transformers side: the server's own plan as rules for MoeModel."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.router import Router, Rule, rule_of
from cor_vllm.kernels import reference
from cor_vllm.modes import LayerRouting
from cor_vllm.overlay import RouterOverlay
from cor_vllm.scores import Scores
from cor_vllm.serve.config import RoutingOptions, plan

GATE_QUANTILE = 0.5  # the bias counts if the entropy is above this quantile of running text


@dataclass
class Slots:
    """How many of the selected experts are not those that the model's own score would have selected."""

    total: int = 0
    changed: int = 0

    @property
    def share(self) -> float:
        """0 to 1; 0 before anything was routed."""
        return self.changed / self.total if self.total else 0.0


@dataclass(frozen=True)
class Gates:
    """Entropies above which a router, or the output, counts as uncertain, nats."""

    router: Sequence[float]  # one per MoE layer
    output: float


@dataclass
class RoutedCondition:
    """What to put on a model: its rules, and what they did."""

    rules: Mapping[int, Rule]
    activations: float  # routed experts per token, over all layers
    slots: Slots = field(default_factory=Slots)


def routed(
    model: MoeModel,
    scores: Scores | None,
    options: dict[str, Any] | None,
    thresholds: Sequence[float] | None = None,
) -> RoutedCondition:
    """The rules of a condition.

    Args:
        model: the model; its MoE layers must be those of the scores.
        scores: the condition's scores; None: only without options.
        options: `additional_config["cor"]` less `scores`; None: the model's own routing.
        thresholds: per layer, the router's entropy (nats) up to which the bias is left out; None: never.

    Raises:
        ValueError: scores of a model with other MoE layers.
    """
    if options is None:
        return RoutedCondition({}, sum(router.top_k for router in model.routers))
    assert scores is not None, "options come with scores"
    layers = list(plan(RoutingOptions.of(options), scores).values())
    if len(layers) != model.num_layers:
        raise ValueError(f"scores of {len(layers)} MoE layers for a model of {model.num_layers}")
    slots = Slots()
    rules = {
        i: _counted(_gated(router, layer, thresholds[i] if thresholds else None), router, slots)
        for i, (router, layer) in enumerate(zip(model.routers, layers, strict=True))
    }
    return RoutedCondition(rules, sum(layer.top_k for layer in layers), slots)


@contextmanager
def replaced_router(model: MoeModel, overlay: RouterOverlay) -> Iterator[None]:
    """The router of an overlay in place of the model's own, which comes back bit for bit.

    Raises:
        CalibrationError: the layer's weights wait in host memory or on disk.
    """
    own, _ = model.router_weight(model.layer_index.index(overlay.layer))
    model.replace_router(overlay.layer, overlay.weight)
    try:
        yield
    finally:
        model.replace_router(overlay.layer, own)


def _gated(router: Router, layer: LayerRouting, threshold: float | None) -> Rule:
    """The layer's rule, with the bias only for tokens whose router's entropy is above the threshold."""
    bias = layer.bias
    if bias is None or threshold is None:
        return rule_of(router, layer)

    def gated(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probs = router.probabilities(logits)
        uncertain = (entropy(probs) > threshold)[:, None]
        return router.select(probs, router.scores(probs, uncertain * bias.to(logits.device)), layer.top_k)

    return gated


def _counted(rule: Rule, router: Router, slots: Slots) -> Rule:
    def counted(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = rule(logits)
        own = router.route(logits, None, ids.shape[1])[1]
        slots.total += ids.numel()
        slots.changed += int((~(ids[:, :, None] == own[:, None, :]).any(dim=2)).sum())
        return weights, ids

    return counted


def entropy(probs: torch.Tensor) -> torch.Tensor:
    """Entropy over the last dimension, nats; values that do not sum to 1 are divided by their sum."""
    shares = probs / probs.sum(dim=-1, keepdim=True).clamp_min(reference.SMALLEST)
    return torch.special.entr(shares).sum(dim=-1)


@torch.inference_mode()
def gates(model: MoeModel, sequences: Sequence[Sequence[int]]) -> Gates:
    """Thresholds from running text: the GATE_QUANTILE of each router's and of the output's entropy.

    Args:
        sequences: token ids.
    """
    outputs = []
    with model.record_router_logits() as records:
        for ids in sequences:
            logits = model.model(torch.tensor([ids], device=model.device)).logits[0].float()
            outputs.append(entropy(logits.softmax(dim=-1)).cpu())
    routers = [
        _quantile(entropy(router.probabilities(torch.cat(record))))
        for router, record in zip(model.routers, records, strict=True)
    ]
    return Gates(routers, _quantile(torch.cat(outputs)))


def _quantile(values: torch.Tensor) -> float:
    return float(torch.quantile(values.double(), GATE_QUANTILE))


Call = Callable[[torch.Tensor], torch.Tensor]
"""input_ids [B, S] → logits [B, S, V]"""


def gated_by_output(model: MoeModel, rules: Mapping[int, Rule], threshold: float, call: Call) -> Call:
    """A forward whose routing is replaced only for tokens whose output entropy exceeds a threshold.

    It costs two passes: the first one, with the model's own routing, finds these tokens.
    """

    def gated(input_ids: torch.Tensor) -> torch.Tensor:
        uncertain = entropy(call(input_ids).float().softmax(dim=-1)) > threshold
        with model.routing(rules, rows=uncertain):
            return call(input_ids)

    return gated
