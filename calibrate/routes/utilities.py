"""What a route analysis measures at one MoE layer: log-probabilities, before any statistic.

T scored tokens; route 0 is the standard one, 1 to G are drawn. Target 0 is the token of the text; targets 1
to J are null targets, drawn from the model's own prediction.
"""

from dataclasses import dataclass
from typing import Any

import torch

from cor_vllm.calibrate.interventions.attention import Places
from cor_vllm.calibrate.routes.draw import Routes


@dataclass(frozen=True, eq=False)
class Standard:
    """What the untouched model says at the T scored positions."""

    places: Places  # T
    document: torch.Tensor  # [T] int64, the document that the token belongs to; documents are resampled
    keys: torch.Tensor  # [T] int64, for the noise
    targets: torch.Tensor  # [T, 1+J] int64 token ids
    log_prob: torch.Tensor  # [T, 1+J] float32, of the targets, nats, by the full forward
    router_logits: list[torch.Tensor]  # per MoE layer [T, N] float32


@dataclass(frozen=True, eq=False)
class Utilities:
    """Utilities of one layer's routes (or of routes drawn at all layers jointly)."""

    layer: int | None  # decoder layer number; None: jointly at all layers
    utility: torch.Tensor  # [T, 1+G, 1+J] float32, log-probability of each target under each route, nats
    first: torch.Tensor  # [T, 1+G] int64, the number of the first route with the same experts
    log_score: torch.Tensor  # [T, 1+G] float32, the router's own score of each route, Σ log s_e
    score: torch.Tensor  # [T, 1+G] float32, Σ s_e
    ids: torch.Tensor | None  # [T, 1+G, k] int16, expert ids, ascending; None if joint

    @classmethod
    def of(cls, layer: int, routes: Routes, utility: torch.Tensor) -> "Utilities":
        """Utilities of routes that were drawn at one layer."""
        return cls(layer, utility, routes.first, routes.log_score, routes.score, routes.ids.short())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields that are tensors, by name; `from_tensors` takes them back."""
        return {name: values for name, values in vars(self).items() if isinstance(values, torch.Tensor)}

    @classmethod
    def from_tensors(cls, layer: int | None, tensors: dict[str, torch.Tensor]) -> "Utilities":
        """The inverse of `tensors`."""
        values: dict[str, Any] = {"ids": None, **tensors}
        return cls(layer=layer, **values)
