"""What every algorithm starts from, the baseline, and what it measures: loss changes at single positions.

There are H hard and E easy positions, in their order over the sequences, and N routed experts; K is the
model's top_k. Nothing is averaged here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cor_vllm.calibrate.model.batches import cut, pad, sequence_batches
from cor_vllm.calibrate.model.forward import batch_losses
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.text.stratify import Strata

Advance = Callable[[int], None]
"""A function that is called with the number of rows that a forward has finished."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """What the untouched model does at all P calibration positions."""

    losses: torch.Tensor  # [P] float32, nats
    router_logits: list[torch.Tensor]  # per MoE layer [P, N] float32


@dataclass(frozen=True, eq=False)
class LayerMeasurement:
    """Loss changes (intervened minus baseline, nats, float64) of the interventions on one MoE layer."""

    hard: torch.Tensor  # [H], output scaled by 1 + δ (Eq. 3)
    easy: torch.Tensor  # [E]
    active: torch.Tensor  # [H, K] int64, the active experts by descending score
    ablation: torch.Tensor  # [H, K], each of them taken away (Eq. 6)
    fewer: torch.Tensor | None = None  # [H], top_k − 1 experts; None if not asked for or impossible
    more: torch.Tensor | None = None  # [H], top_k + 1 experts

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are not None, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "LayerMeasurement":
        """The inverse of `tensors`."""
        return cls(**tensors)


def baseline(model: MoeModel, sequences: Sequence[Sequence[int]]) -> Baseline:
    """Measure losses and router logits of every position, without intervention.

    Raises:
        RuntimeError: a router was not called once per forward, so interventions on it would do nothing.
    """
    padded = [pad(group) for group in sequence_batches(sequences)]
    with model.record_router_logits() as records:
        [losses] = batch_losses(model, padded)
    logits = []
    for layer, record in enumerate(records):
        if len(record) != len(padded):
            raise RuntimeError(
                f"the router of MoE layer {layer} ran {len(record)} times in {len(padded)} forwards, not "
                "once each: the model bypasses its router module, and calibrating it would measure nothing"
            )
        per_row = [
            values.view(*input_ids.shape, -1) for values, input_ids in zip(record, padded, strict=True)
        ]
        logits.append(cut(per_row, sequences))
    return Baseline(cut(losses, sequences), logits)


def active_experts(model: MoeModel, base: Baseline, strata: Strata) -> list[torch.Tensor]:
    """The active experts A(t) of every hard position.

    Returns:
        For each MoE layer [H, top_k] int64, by descending score.
    """
    logits = [router_logits[strata.hard] for router_logits in base.router_logits]
    return [router.route(rows)[1].long() for router, rows in zip(model.routers, logits, strict=True)]
