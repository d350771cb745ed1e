"""Holds the hidden states that are carried through the layers for some consecutive sequences."""

from collections.abc import Sequence

import torch

from cor_vllm.calibrate.config import CalibrationOptions
from cor_vllm.calibrate.interventions.attention import Places
from cor_vllm.calibrate.model.batches import pad
from cor_vllm.calibrate.model.layers import enter
from cor_vllm.calibrate.model.moe_model import MoeModel


class Sequences:
    """B consecutive sequences of at most S tokens, at the entrance of a decoder layer.

    Args:
        model: its embedding must be at hand.
        members: which of `sequences`.
        sequences: token ids.
    """

    def __init__(self, model: MoeModel, members: range, sequences: Sequence[Sequence[int]]) -> None:
        self.members = members
        self.input_ids = pad([sequences[s] for s in members])  # [B, S]
        with torch.inference_mode():
            hidden, self.arguments = enter(model.model.model, self.input_ids.to(model.device))
        self.hidden = hidden.cpu()  # [B, S, D], the unperturbed input of the next layer

    def at(self, places: Places) -> torch.Tensor:
        """The unperturbed hidden states [R, D] at R places."""
        return self.hidden[places.sequence, places.position]


class Chunk(Sequences):
    """Consecutive sequences with all of the sweep's variants that start from them.

    A variant is one position under one intervention. Every MoE layer starts the same F variants, in this
    order: each hard position without each of its active experts, then with one expert fewer, then with one
    more, then hard and easy positions with the layer's output scaled. Parts that the options do not ask for
    are empty. Variant f of MoE layer m is row m·F + f.
    """

    def __init__(
        self, model: MoeModel, options: CalibrationOptions, members: range,
        sequences: Sequence[Sequence[int]], hard: Sequence[tuple[int, int]], easy: Sequence[tuple[int, int]],
    ) -> None:  # fmt: skip
        super().__init__(model, members, sequences)
        self.hard = [(s - members.start, t) for s, t in hard if s in members]
        self.easy = [(s - members.start, t) for s, t in easy if s in members]
        other_k = (model.top_k - 1, model.top_k + 1) if options.intensity == "marginal" else ()
        per_token = options.perturb_scope == "token"
        parts = {
            "ablation": [place for place in self.hard for _ in range(model.top_k)],
            "fewer": self.hard if other_k and other_k[0] >= 1 else [],
            "more": self.hard if other_k and other_k[1] <= model.eligible_experts else [],
            "scaled": self.hard + self.easy if per_token else [],
        }
        self.parts: dict[str, slice] = {}
        start = 0
        for name, places in parts.items():
            self.parts[name] = slice(start, start := start + len(places))
        self.size = start  # F
        self.places = _places([place for places in parts.values() for place in places])
        layers, width = model.num_layers, self.hidden.shape[-1]
        self.rows = self.hidden.new_empty(layers * self.size, width)  # variants
        copies = 0 if per_token else layers
        self.copies = self.hidden.new_empty(copies, *self.hidden.shape)  # sequences scaled at layer m
        self.row_losses = torch.empty(0)  # [M·F] nats, once the last layer is done
        self.copy_losses = torch.empty(0)  # [M, hard and easy positions]

    def host_bytes(self) -> int:
        """Bytes that wait on the host after the last layer."""
        return self.hidden.nbytes + self.rows.nbytes + self.copies.nbytes

    def measured_places(self) -> Places:
        """Where the hard positions stand, then the easy ones."""
        return _places(self.hard + self.easy)

    def places_of(self, start: int, stop: int) -> Places:
        """Where the rows from `start` to `stop` − 1 stand."""
        return self.places[torch.arange(start, stop) % self.size]


def _places(pairs: Sequence[tuple[int, int]]) -> Places:
    values = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return Places(values[:, 0], values[:, 1])
