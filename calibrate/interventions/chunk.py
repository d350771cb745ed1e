"""Holds the hidden states that the sweep carries through the layers for some consecutive sequences."""

from collections.abc import Sequence

import torch

from cor_vllm.calibrate.config import CalibrationOptions
from cor_vllm.calibrate.interventions.attention import Places
from cor_vllm.calibrate.model.batches import pad
from cor_vllm.calibrate.model.layers import enter
from cor_vllm.calibrate.model.moe_model import MoeModel


class Chunk:
    """B consecutive sequences of at most S tokens, with all variants that start from them.

    A variant is one position under one intervention. Every MoE layer starts the same F variants, in this
    order: each hard position without each of its active experts, then with one expert fewer, then with one
    more, then hard and easy positions with the layer's output scaled. Parts that the options do not ask for
    are empty. Variant f of MoE layer m is row m·F + f.
    """

    def __init__(
        self, model: MoeModel, options: CalibrationOptions, members: range,
        sequences: Sequence[Sequence[int]], hard: Sequence[tuple[int, int]], easy: Sequence[tuple[int, int]],
    ) -> None:  # fmt: skip
        self.members = members
        self.input_ids = pad([sequences[s] for s in members])  # [B, S]
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
        with torch.inference_mode():
            hidden, self.arguments = enter(model.model.model, self.input_ids.to(model.device))
        self.hidden = hidden.cpu()  # [B, S, D], the unperturbed input of the next layer
        layers, width = model.num_layers, hidden.shape[-1]
        self.rows = hidden.new_empty(layers * self.size, width, device="cpu")  # variants
        copies = 0 if per_token else layers
        self.copies = hidden.new_empty(copies, *hidden.shape, device="cpu")  # sequences scaled at layer m
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
