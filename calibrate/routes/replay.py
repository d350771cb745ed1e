"""Utilities of routes at any MoE layer, and of routes at all of them jointly, in one pass over the layers.

The sequences are carried through the decoder layers, and next to them the variants: each scored token under
each of its routes. A variant attends to its own key and value and to the unperturbed ones before it, so what
the layers above make of a route is computed at that position alone. The standard route is a variant like the
others, so that differences between routes hold no rounding of another way of computing.

The variants' hidden states wait on the host. If they would take more than HOST_MEMORY there, the sequences
are divided into groups that pass through the layers one after the other.

Source: arXiv 2605.07260; docs/reference/method.md, "One sweep in place of thousands of passes".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch

from cor_vllm.calibrate.interventions.carrier import Carrier, blocks
from cor_vllm.calibrate.interventions.measurement import Advance
from cor_vllm.calibrate.model.layers import chunks
from cor_vllm.calibrate.model.memory import check_host_memory
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.offload import held
from cor_vllm.calibrate.routes.draw import DrawOptions
from cor_vllm.calibrate.routes.parts import Part, RouteChunk
from cor_vllm.calibrate.routes.standard import ScoredText
from cor_vllm.calibrate.routes.utilities import Standard, Utilities
from cor_vllm.calibrate.routes.variants import JointVariants, LayerVariants, Variants

HOST_MEMORY = 4 * 2**30  # bytes that the variants' hidden states may take on the host at one time
FILLED = ("utility", "log_score", "score")  # the fields of utilities that are filled in on the way


class Replay:
    """Measures the utilities of routes by carrying variants through the layers.

    One step is one decoder layer for one group of sequences, or the reading after its last layer.

    Args:
        model: the model.
        text: the sequences and their scored positions.
        standard: of `read_standard`; the routes are drawn from its router logits.
        layers: numbers of the MoE layers whose routes are measured, each on its own.
        joint: measure routes at all layers together, too.
        options: how routes are drawn.
        max_memory: bytes that the activations of one call may take.
        advance: is called with the number of rows that are done.
        host_memory: bytes that the hidden states of a group's variants may take on the host; a group has at
            least one sequence.

    Raises:
        CalibrationError: the model cannot be carried layer by layer, or memory is too small.
    """

    def __init__(
        self, model: MoeModel, text: ScoredText, standard: Standard, layers: Sequence[int], joint: bool,
        options: DrawOptions, max_memory: int, advance: Advance = lambda rows: None,
        host_memory: int = HOST_MEMORY,
    ) -> None:  # fmt: skip
        self._model, self._text, self._standard, self._advance = model, text, standard, advance
        self._moe_number = {index: m for m, index in enumerate(model.layer_index)}
        self._carrier = Carrier(model, text.sequences, max_memory)
        self._per_group = len(self._carrier.layers) + 1  # steps
        self._starts = torch.tensor([0, *map(len, text.positions)]).cumsum(0).tolist()
        self._variants: list[Variants] = [LayerVariants.draw(model, standard, options, moe) for moe in layers]
        if joint:
            self._variants.append(JointVariants.all(model, standard, options))
        row = model.config.hidden_size * model.model.dtype.itemsize
        self._groups = list(self._grouped(host_memory // row))
        rows = [self._padded(group) + self._started(group) for group in self._groups]
        check_host_memory(row * max(rows), "lower --max-tokens")
        self._chunks: list[RouteChunk] = []  # of the group that is on its way

    def _grouped(self, rows: int) -> Iterator[range]:
        """Divide the sequences into groups that have at most so many variants, or one sequence."""
        start = taken = 0
        for number in range(len(self._text.sequences)):
            own = self._started(range(number, number + 1))
            if number > start and taken + own > rows:
                yield range(start, number)
                start, taken = number, 0
            taken += own
        yield range(start, len(self._text.sequences))

    def _split(self, group: range) -> list[range]:
        """The chunks of a group: runs of sequences that one layer call takes."""
        parts = chunks(self._text.sequences[group.start : group.stop], self._carrier.block)
        return [range(part.start + group.start, part.stop + group.start) for part in parts]

    def _padded(self, group: range) -> int:
        """How many tokens a group's sequences have with their padding."""
        lengths = [len(ids) for ids in self._text.sequences]
        return sum(len(part) * max(lengths[part.start : part.stop]) for part in self._split(group))

    def _tokens(self, members: range) -> slice:
        """The numbers of the scored tokens of some sequences."""
        return slice(self._starts[members.start], self._starts[members.stop])

    def _started(self, members: range, layers: int | None = None) -> int:
        """How many variants some sequences have after so many decoder layers; None: after all."""
        tokens = self._tokens(members)
        parts = [kind.within(tokens) for kind in self._variants if layers is None or kind.layer < layers]
        return sum(part.stop - part.start for part in parts)

    def work(self) -> list[int]:
        """How many rows each step will run; rows are the unit of progress."""
        steps = []
        for group in self._groups:
            padded = self._padded(group)
            steps += [padded + self._started(group, layers) for layers in range(1, self._per_group)]
            steps.append(self._started(group))
        return steps

    def state(self, steps: int) -> dict[str, torch.Tensor]:
        """What `restore` needs to go on after so many steps."""
        tensors = {"steps": torch.tensor(steps)}
        for name, values in self._filled():
            tensors[name] = values
        for number, chunk in enumerate(self._chunks):
            tensors[f"chunk/{number}/hidden"] = chunk.hidden
            for name, part in self._parts(number, steps % self._per_group):
                tensors[name] = part.rows
        return tensors

    @torch.inference_mode()
    def restore(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Take up a saved state and return the number of finished steps."""
        if not tensors:
            return 0
        steps = int(tensors["steps"])
        for name, values in self._filled():
            values.copy_(tensors[name])
        group, layers = divmod(steps, self._per_group)
        if layers:
            self._enter(group)
        for number, chunk in enumerate(self._chunks):
            chunk.hidden = tensors[f"chunk/{number}/hidden"].clone()
            for name, part in self._parts(number, layers):
                # Into the same memory as without a break: kernels may round by alignment.
                part.rows.copy_(tensors[name])
        return steps

    def _filled(self) -> Iterator[tuple[str, torch.Tensor]]:
        """By name, what the variants have filled in so far."""
        for number, kind in enumerate(self._variants):
            for field in FILLED:
                yield f"variants/{number}/{field}", getattr(kind.utilities, field)

    def _parts(self, number: int, layers: int) -> Iterator[tuple[str, Part]]:
        """By name, the parts of a chunk that have started after so many decoder layers."""
        for p, part in enumerate(self._chunks[number].parts):
            if part.variants.layer < layers:
                yield f"chunk/{number}/{p}", part

    @torch.inference_mode()
    def step(self, index: int) -> None:
        """Carry a group through a decoder layer, or read its utilities after the last."""
        group, layer = divmod(index, self._per_group)
        if layer == 0:
            self._enter(group)
        if layer < self._per_group - 1:
            with self._carrier.layer(layer):
                for chunk in self._chunks:
                    self._carry(chunk, layer)
            return
        with self._carrier.head():
            for chunk in self._chunks:
                for part in chunk.parts:
                    self._read(part)
        self._chunks = []

    def _enter(self, group: int) -> None:
        sequences, places = self._text.sequences, self._standard.places
        with held(self._model.model.get_input_embeddings()):
            self._chunks = [
                RouteChunk(self._model, members, sequences, self._tokens(members), places, self._variants)
                for members in self._split(self._groups[group])
            ]

    def _carry(self, chunk: RouteChunk, index: int) -> None:
        """Carry one chunk through one layer: first the sequences, whose keys and values the variants need."""
        for part in chunk.parts:
            if part.variants.layer == index:
                part.rows.copy_(chunk.at(part.places))
        self._carrier.carry_sequences(chunk, index, chunk.scored)
        self._advance(chunk.input_ids.numel())
        for part in chunk.parts:
            if part.variants.layer <= index:
                self._carry_part(chunk, part, index)

    def _carry_part(self, chunk: RouteChunk, part: Part, index: int) -> None:
        """Carry variants through one layer, on the routes that they have there."""
        moe = self._moe_number.get(index)
        for block in blocks(len(part.rows), self._carrier.block):
            own = slice(part.own.start + block.start, part.own.start + block.stop)
            rule = None if moe is None else part.variants.rule(moe, own)
            with nullcontext() if moe is None or rule is None else self._model.routing({moe: rule}):
                places = part.places[torch.arange(block.start, block.stop)]
                part.rows[block] = self._carrier.run_variants(chunk, index, part.rows[block], places)
            self._advance(len(places))

    def _read(self, part: Part) -> None:
        targets = self._standard.targets[part.token]

        def log_probs(normed: torch.Tensor, block: slice) -> torch.Tensor:
            logits = self._model.model.lm_head(normed).float()
            wanted = logits.gather(1, targets[block].to(logits.device))
            return wanted - logits.logsumexp(dim=1, keepdim=True)

        if len(targets):
            part.variants.utilities.utility[part.token, part.route] = self._carrier.read(part.rows, log_probs)
        self._advance(len(targets))

    def result(self) -> list[Utilities]:
        """The utilities of each layer that was asked for, then the joint ones, once all steps are done."""
        return [kind.result() for kind in self._variants]


def layer_utilities(
    model: MoeModel, text: ScoredText, standard: Standard, layers: Sequence[int], joint: bool,
    options: DrawOptions, max_memory: int, advance: Advance = lambda rows: None,
    saved: Mapping[str, torch.Tensor] | None = None,
    save: Callable[[Mapping[str, torch.Tensor]], None] = lambda state: None,
) -> list[Utilities]:  # fmt: skip
    """Run a `Replay` to its end.

    Args:
        model, text, standard, layers, joint, options, max_memory, advance: as `Replay` takes them.
        saved: a state that an interrupted run gave to `save`; None: start at the first layer.
        save: is given the state after each step.

    Returns:
        The utilities of each layer, then the joint ones if they are asked for.
    """
    replay = Replay(model, text, standard, layers, joint, options, max_memory, advance)
    for step in range(replay.restore(saved or {}), len(replay.work())):
        replay.step(step)
        save(replay.state(step + 1))
    return replay.result()
