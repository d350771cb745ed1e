"""Runs a model's decoder layers one at a time, each called as the model itself would call it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from cor_vllm.calibrate.config import CalibrationError

FOLLOWED = ("sdpa", "eager")  # attention implementations that are given a mask, from which windows are read
# The remedy if a model's layers cannot be run one at a time, or not on single positions.
INSTEAD = "calibrate with --algorithm plain, or analyse with --layers final"


@dataclass(frozen=True, eq=False)
class Arguments:
    """What the model hands to each decoder layer besides hidden states: mask, rotary embedding and so on."""

    of_layer: list[dict[str, Any]]  # for sequences [B, S, D]; all rows of the batch share them

    def for_positions(self, layer: int, position: torch.Tensor) -> dict[str, Any]:
        """The arguments for one row [1, R, D] whose entries stand at `position` [R] and have no mask.

        A rotary embedding [1, S, …] depends on the position alone, so the entries' own are picked out of it.
        """
        arguments = dict(self.of_layer[layer])

        def pick(values: torch.Tensor) -> torch.Tensor:
            return values[:, position.to(values.device)]

        for name in ("position_embeddings", "position_ids"):
            if arguments.get(name) is not None:
                arguments[name] = tree_map(pick, arguments[name])
        return arguments | {"attention_mask": None}


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps the arguments and hands its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.hidden = torch.empty(0)

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.arguments = arguments
        self.hidden = hidden
        return hidden


@contextmanager
def _recorders(decoder: Any) -> Iterator[list[_Recorder]]:
    layers, norm = decoder.layers, decoder.norm
    recorders = [_Recorder() for _ in layers]
    decoder.layers, decoder.norm = nn.ModuleList(recorders), nn.Identity()
    try:
        yield recorders
    finally:
        decoder.layers, decoder.norm = layers, norm


def check_rotary(config: Any) -> None:
    """Raise a CalibrationError if the rotary embedding depends on more than the position."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise CalibrationError(
            f"{config.model_type}: rotary embedding {rope!r} depends on the length of the sequence; {INSTEAD}"
        )


def enter(decoder: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, Arguments]:
    """Run a decoder up to its first layer.

    Args:
        decoder: the `model` of a `…ForCausalLM`.
        input_ids: [B, S] on the decoder's device, without padding on the left.

    Returns:
        What goes into the first layer, [B, S, D], and what every layer gets besides.
    """
    with _recorders(decoder) as recorders:
        decoder(input_ids=input_ids, use_cache=False)
    # No sequence is padded on the left, so all rows of a batch have the same mask: one is enough.
    return recorders[0].hidden, Arguments([_one_row(recorder.arguments) for recorder in recorders])


def _one_row(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }


def run(layer: nn.Module, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    """Run one decoder layer: [B, S, D] → [B, S, D]."""
    output = layer(hidden, **arguments)
    if not isinstance(output, torch.Tensor):
        raise CalibrationError(
            f"{type(layer).__name__} returns {type(output).__name__}, not hidden states; {INSTEAD}"
        )
    return output


def chunks(sequences: Sequence[Sequence[int]], rows: int) -> list[range]:
    """Split sequences into runs that, padded to the longest, hold at most `rows` tokens (or one sequence)."""
    parts: list[range] = []
    start = 0
    for stop in range(1, len(sequences) + 1):
        width = max(map(len, sequences[start:stop]))
        if stop - start > 1 and width * (stop - start) > rows:
            parts.append(range(start, stop - 1))
            start = stop - 1
    return [*parts, range(start, len(sequences))]
