"""What an algorithm measures: loss changes at single positions, before any averaging.

H hard and E easy positions in their order over the sequences, K = the model's top_k, N routed experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Baseline:
    """The untouched model on all P calibration positions."""

    losses: torch.Tensor  # [P] float32, nats
    router_logits: list[torch.Tensor]  # per MoE layer [P, N] float32


@dataclass(frozen=True, eq=False)
class LayerMeasurement:
    """Loss changes (intervened minus baseline, nats, float64) of the interventions on one MoE layer."""

    hard: torch.Tensor  # [H], output scaled by 1 + δ (Eq. 3)
    easy: torch.Tensor  # [E]
    active: torch.Tensor  # [H, K] int64, the active experts by descending probability
    ablation: torch.Tensor  # [H, K], each of them taken away (Eq. 6)
    fewer: torch.Tensor | None = None  # [H], top_k − 1 experts; None where not asked for or impossible
    more: torch.Tensor | None = None  # [H], top_k + 1 experts

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are there, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "LayerMeasurement":
        """The inverse of `tensors`."""
        return cls(**tensors)
