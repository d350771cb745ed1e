"""Carries sequences, and variants of single positions, through a model one decoder layer at a time.

A variant is one position whose hidden state an intervention has changed. It needs no sequence of its own: it
attends to its own key and value and to the unperturbed ones before it. The sweep and the utilities of routes
both go through here; they differ in which variants there are and in what changes them.

Source: docs/reference/method.md, "One sweep in place of thousands of passes".
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.interventions.attention import Places, SharedAttention
from cor_vllm.calibrate.interventions.chunk import Sequences
from cor_vllm.calibrate.model.layers import INSTEAD, check_rotary, run
from cor_vllm.calibrate.model.memory import head_rows, layer_rows
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.offload import held

CHECKED = 16  # positions of each chunk and layer on which a variant's path is compared with the sequence's
DISAGREEMENT = 0.05  # relative; bfloat16 rounding stays far below it at the median position


class Carrier:
    """Runs the decoder layers of a model on sequences and on their variants.

    Args:
        model: the model.
        sequences: all that will be carried; their longest counts.
        max_memory: bytes that the activations of one call may take.

    Raises:
        CalibrationError: the model cannot be carried this way, or not even one sequence fits.
    """

    def __init__(self, model: MoeModel, sequences: Sequence[Sequence[int]], max_memory: int) -> None:
        check_rotary(model.config)
        self.layers = model.decoder_layers
        self.block = layer_rows(model, max(map(len, sequences)), max_memory)  # rows of one layer call
        self._head_block = head_rows(model, max_memory)
        self._model = model
        self._attention = SharedAttention(model.config)

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Inside, the weights of decoder layer `index` are at hand, and its attention serves variants."""
        with held(self.layers[index]), self._attention.installed():
            yield
        self._attention.forget()

    def carry_sequences(self, chunk: Sequences, index: int, checked: Places) -> None:
        """Carry a chunk's sequences through a layer; its variants need the keys and values of this call.

        Args:
            chunk: its `hidden` moves from the layer's entrance to its exit.
            index: decoder layer number.
            checked: positions on some of which a variant's way is compared with that of its sequence.
        """
        arguments = chunk.arguments.of_layer[index]
        before = chunk.hidden
        with self._attention.record(arguments["attention_mask"], before.shape[1]):
            chunk.hidden = run(self.layers[index], before.to(self._model.device), arguments).cpu()
        self._check(chunk, index, before, checked)

    def run_variants(self, chunk: Sequences, index: int, rows: torch.Tensor, places: Places) -> torch.Tensor:
        """Run decoder layer `index` on variants [R, D] that stand at `places`; the result is on the host."""
        arguments = chunk.arguments.for_positions(index, places.position)
        with self._attention.variants(places):
            return run(self.layers[index], rows[None].to(self._model.device), arguments)[0].cpu()

    def _check(self, chunk: Sequences, index: int, before: torch.Tensor, measured: Places) -> None:
        """Check that a variant without an intervention comes out as its sequence does.

        All rests on it: a layer must see other positions through its attention alone.
        """
        if not len(measured):
            return
        places = measured[torch.linspace(0, len(measured) - 1, CHECKED).long()]
        expected = chunk.at(places).float()
        rows = self.run_variants(chunk, index, before[places.sequence, places.position], places)
        error = ((rows.float() - expected).norm(dim=1) / expected.norm(dim=1)).median().item()
        if not error <= DISAGREEMENT:
            raise CalibrationError(
                f"{self._model.config.model_type}: decoder layer {index} computes a single position "
                f"otherwise than within its sequence (relative difference {error:.2g}); {INSTEAD}"
            )

    @contextmanager
    def head(self) -> Iterator[None]:
        """Inside, the weights of the final norm and of the head are at hand."""
        with held(self._model.model.model.norm, self._model.model.lm_head):
            yield

    def read(
        self, hidden: torch.Tensor, values: Callable[[torch.Tensor, slice], torch.Tensor]
    ) -> torch.Tensor:
        """Read something off the rows [R, D] that left the last layer, block by block.

        Args:
            hidden: on the host.
            values: (rows after the final norm, which rows of `hidden` they are) → a value for each of them.

        Returns:
            [R, …] on the host; [0] if there are no rows.
        """
        decoder, device = self._model.model.model, self._model.device
        found = [
            values(decoder.norm(hidden[block].to(device)), block).cpu()
            for block in blocks(len(hidden), self._head_block)
        ]
        return torch.cat(found) if found else torch.empty(0)


def blocks(total: int, size: int) -> Iterator[slice]:
    """Cut the numbers from 0 to `total` − 1 into runs of at most `size`."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
