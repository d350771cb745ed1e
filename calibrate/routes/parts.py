"""Holds the hidden states that a route analysis carries through the layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cor_vllm.calibrate.interventions.attention import Places
from cor_vllm.calibrate.interventions.chunk import Sequences
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.routes.variants import Variants


@dataclass(frozen=True, eq=False)
class Part:
    """Those variants of one kind that belong to one chunk of sequences."""

    variants: Variants  # all of the kind
    own: slice  # which of them are here
    places: Places  # R, within the chunk
    rows: torch.Tensor  # [R, D] hidden states on the host; not set before the variants' first layer

    @property
    def token(self) -> torch.Tensor:
        """[R] numbers of their tokens among all scored ones."""
        return self.variants.token[self.own]

    @property
    def route(self) -> torch.Tensor:
        """[R] numbers of their routes."""
        return self.variants.route[self.own]


class RouteChunk(Sequences):
    """Consecutive sequences with the variants of their scored tokens.

    Args:
        model, members, sequences: as in `Sequences`.
        tokens: the numbers of their scored tokens.
        places: where all scored tokens stand.
        variants: all that are measured.
    """

    def __init__(
        self, model: MoeModel, members: range, sequences: Sequence[Sequence[int]], tokens: slice,
        places: Places, variants: Sequence[Variants],
    ) -> None:  # fmt: skip
        super().__init__(model, members, sequences)
        self.scored = Places(places.sequence[tokens] - members.start, places.position[tokens])
        self.parts: list[Part] = []
        for kind in variants:
            own = kind.within(tokens)
            at = self.scored[kind.token[own] - tokens.start]
            self.parts.append(Part(kind, own, at, self.hidden.new_empty(len(at), self.hidden.shape[-1])))
