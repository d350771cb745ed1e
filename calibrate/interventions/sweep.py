"""The sweep: every intervention in one pass over the layers, so that each layer's weights are used once.

The sweep carries the unperturbed sequences through the layers and, next to them, variants: single positions
whose hidden state an intervention has changed. An intervention at position t leaves earlier positions alone,
so a variant needs no sequence of its own: it attends to its own key and value and to the unperturbed ones
before t. At MoE layer l new variants start from the unperturbed states that enter the layer, and pass through
it under their intervention; from then on they are carried like the older ones. If a whole sequence is
perturbed, a full copy of it is carried, too. All losses are read at the end.

Hidden states wait on the host; a layer call takes a block of them, as large as --max-memory allows.

Source: docs/reference/method.md, "One sweep in place of thousands of passes".
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from cor_vllm.calibrate.config import CalibrationOptions
from cor_vllm.calibrate.interventions.attention import Places
from cor_vllm.calibrate.interventions.carrier import Carrier, blocks
from cor_vllm.calibrate.interventions.chunk import Chunk
from cor_vllm.calibrate.interventions.measurement import Advance, Baseline, LayerMeasurement, active_experts
from cor_vllm.calibrate.model.layers import chunks, run
from cor_vllm.calibrate.model.memory import check_host_memory
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.offload import held
from cor_vllm.calibrate.text.stratify import Strata, locate


class Sweep:
    """Measures all layers in one pass. It takes the arguments of PlainAlgorithm, and only `--scope token`.

    One step is one decoder layer; the last step reads the losses.
    """

    def __init__(
        self,
        model: MoeModel,
        options: CalibrationOptions,
        sequences: Sequence[Sequence[int]],
        base: Baseline,
        strata: Strata,
        advance: Advance = lambda rows: None,
    ) -> None:
        self._model, self._options, self._advance = model, options, advance
        self._strata, self._base = strata, base
        self._active = active_experts(model, base, strata)
        self._moe_number = {index: m for m, index in enumerate(model.layer_index)}
        hard, easy = locate(strata.hard, sequences), locate(strata.easy, sequences)
        self._carrier = Carrier(model, sequences, options.max_memory)
        with held(model.model.get_input_embeddings()):
            self._chunks = [
                Chunk(model, options, members, sequences, hard, easy)
                for members in chunks(sequences, self._carrier.block)
            ]
        check_host_memory(sum(chunk.host_bytes() for chunk in self._chunks))
        self._layers = model.decoder_layers

    def work(self) -> list[int]:
        """How many rows each step will run; rows are the unit of progress."""
        steps = []
        for index in range(len(self._layers)):
            forks = self._forks(index + 1)
            steps.append(sum(self._rows(chunk, forks) for chunk in self._chunks))
        return [*steps, sum(len(chunk.rows) for chunk in self._chunks)]

    @staticmethod
    def _rows(chunk: Chunk, forks: int) -> int:
        copies = forks if len(chunk.copies) else 0
        return chunk.input_ids.numel() * (1 + copies) + forks * chunk.size

    def _forks(self, layers: int) -> int:
        """How many MoE layers have started variants after so many decoder layers."""
        return sum(index < layers for index in self._model.layer_index)

    def state(self, steps: int) -> dict[str, torch.Tensor]:
        """What `restore` needs to go on after so many steps."""
        tensors = {"steps": torch.tensor(steps)}
        forks = self._forks(steps)
        for number, chunk in enumerate(self._chunks):
            if steps > len(self._layers):
                tensors |= {
                    f"{number}/row_losses": chunk.row_losses,
                    f"{number}/copy_losses": chunk.copy_losses,
                }
                continue
            tensors |= {
                f"{number}/hidden": chunk.hidden,
                f"{number}/rows": chunk.rows[: forks * chunk.size],
                f"{number}/copies": chunk.copies[:forks],
            }
        return tensors

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Take up a saved state and return the number of finished steps."""
        if not tensors:
            return 0
        steps = int(tensors["steps"])
        for name, values in tensors.items():
            if name == "steps":
                continue
            number, field = name.split("/")
            chunk = self._chunks[int(number)]
            if field in ("rows", "copies"):
                # Into the same memory as without a break: kernels may round by alignment.
                getattr(chunk, field)[: len(values)] = values
            else:
                setattr(chunk, field, values.clone())
        return steps

    @torch.inference_mode()
    def step(self, index: int) -> None:
        """Carry everything through decoder layer `index`, or read the losses after the last."""
        if index == len(self._layers):
            with self._carrier.head():
                for chunk in self._chunks:
                    self._read_losses(chunk)
            return
        with self._carrier.layer(index):
            for chunk in self._chunks:
                self._carry(chunk, index)

    def _carry(self, chunk: Chunk, index: int) -> None:
        """Carry one chunk through one layer: first the sequences, whose keys and values the variants need."""
        moe = self._moe_number.get(index)
        if moe is not None:
            fork = slice(moe * chunk.size, (moe + 1) * chunk.size)
            chunk.rows[fork] = chunk.at(chunk.places)
            if len(chunk.copies):
                chunk.copies[moe] = chunk.hidden
        self._carrier.carry_sequences(chunk, index, chunk.measured_places())
        self._advance(chunk.input_ids.numel())
        for block in blocks(self._forks(index + 1) * chunk.size, self._carrier.block):
            with self._interventions(chunk, moe, block):
                places = chunk.places_of(block.start, block.stop)
                chunk.rows[block] = self._carrier.run_variants(chunk, index, chunk.rows[block], places)
            self._advance(block.stop - block.start)
        self._carry_copies(chunk, index, moe)

    def _carry_copies(self, chunk: Chunk, index: int, moe: int | None) -> None:
        if not len(chunk.copies):
            return
        copies = chunk.copies.flatten(0, 1)  # a view: [M·B, S, D]
        per_call = max(1, self._carrier.block // copies.shape[1])
        new = len(copies) if moe is None else moe * len(chunk.members)
        for block in blocks(self._forks(index + 1) * len(chunk.members), per_call):
            where = torch.arange(block.start, block.stop)[:, None].expand(-1, copies.shape[1]) >= new
            with ExitStack() as stack:
                if where.any():
                    stack.enter_context(self._scaled(new // len(chunk.members), where))
                hidden = copies[block].to(self._model.device)
                copies[block] = run(self._layers[index], hidden, chunk.arguments.of_layer[index]).cpu()
            self._advance(where.numel())

    @contextmanager
    def _interventions(self, chunk: Chunk, moe: int | None, block: slice) -> Iterator[None]:
        """Inside, the rows of a block that start at this MoE layer are under their interventions."""
        with ExitStack() as stack:
            for name, part in chunk.parts.items():
                if moe is None:
                    continue
                own = torch.arange(block.start, block.stop) - moe * chunk.size - part.start
                where = (own >= 0) & (own < part.stop - part.start)
                if where.any():
                    stack.enter_context(self._intervention(chunk, moe, name, own, where))
            yield

    def _intervention(self, chunk: Chunk, moe: int, name: str, own: torch.Tensor, where: torch.Tensor) -> Any:
        """The intervention of one part.

        Args:
            own: [R] the number of each row within the part; it means something only if the row is in `where`.
            where: [R] bool, the rows of this part.
        """
        if name == "scaled":
            return self._scaled(moe, where[None])
        router = self._model.routers[moe]
        if name == "ablation":
            active = self._active[moe][self._hard_rows(chunk)].flatten()
            experts = torch.where(where, active[own.clamp(0, len(active) - 1)], 0)
            return self._model.routing({moe: router.without(experts, self._options.ablation)}, where[None])
        top_k = router.top_k + (1 if name == "more" else -1)
        return self._model.routing({moe: lambda logits: router.route(logits, top_k=top_k)}, where[None])

    def _scaled(self, moe: int, where: torch.Tensor) -> Any:
        whole_layer = self._options.perturb_target == "layer"
        return self._model.scale_output(moe, 1 + self._options.delta, where, whole_layer)

    def _hard_rows(self, chunk: Chunk) -> slice:
        """Which of all H hard positions belong to the chunk."""
        start = sum(len(other.hard) for other in self._chunks if other.members.stop <= chunk.members.start)
        return slice(start, start + len(chunk.hard))

    def _read_losses(self, chunk: Chunk) -> None:
        places = chunk.places_of(0, len(chunk.rows))
        chunk.row_losses = self._losses(chunk, chunk.rows, places)
        measured = chunk.measured_places()
        if len(chunk.copies):
            copies = chunk.copies[:, measured.sequence, measured.position]
            repeated = Places(
                *(values.repeat(len(copies)) for values in (measured.sequence, measured.position))
            )
            losses = self._losses(chunk, copies.flatten(0, 1), repeated)
            chunk.copy_losses = losses.view(len(copies), -1)
        self._advance(len(chunk.rows))

    def _losses(self, chunk: Chunk, hidden: torch.Tensor, places: Places) -> torch.Tensor:
        """[R] float32 losses of the rows [R, D] that left the last layer, nats."""
        targets = chunk.input_ids[places.sequence, places.position + 1]
        return self._carrier.read(
            hidden, lambda normed, block: self._model.head_losses(normed, targets[block])
        )

    def result(self) -> list[LayerMeasurement]:
        """The loss changes of every MoE layer, once all steps are done."""
        hard, easy = (self._base.losses[mask].double() for mask in (self._strata.hard, self._strata.easy))
        return [self._measurement(m, hard, easy) for m in range(self._model.num_layers)]

    def _measurement(self, moe: int, hard: torch.Tensor, easy: torch.Tensor) -> LayerMeasurement:
        def part(name: str) -> torch.Tensor:
            losses = [
                chunk.row_losses[moe * chunk.size : (moe + 1) * chunk.size][chunk.parts[name]]
                for chunk in self._chunks
            ]
            return torch.cat(losses).double()

        def change(name: str) -> torch.Tensor | None:
            losses = part(name)
            return losses - hard if len(losses) else None

        scaled_hard, scaled_easy = self._scaled_losses(moe)
        ablated = part("ablation").view(len(hard), self._model.top_k)
        return LayerMeasurement(
            hard=scaled_hard - hard,
            easy=scaled_easy - easy,
            active=self._active[moe],
            ablation=ablated - hard[:, None],
            fewer=change("fewer"),
            more=change("more"),
        )

    def _scaled_losses(self, moe: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of hard and easy positions with this layer scaled, in their order over all sequences."""
        sides: list[list[torch.Tensor]] = [[], []]
        for chunk in self._chunks:
            fork = chunk.row_losses[moe * chunk.size : (moe + 1) * chunk.size]
            losses = chunk.copy_losses[moe] if len(chunk.copies) else fork[chunk.parts["scaled"]]
            sides[0].append(losses[: len(chunk.hard)])
            sides[1].append(losses[len(chunk.hard) :])
        return torch.cat(sides[0]).double(), torch.cat(sides[1]).double()
