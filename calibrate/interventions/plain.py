"""The plain algorithm: one full forward for each intervention. It is slow, obvious, and the sweep's oracle.

Rows of a batch do not see each other, so several interventions share a forward call, one in each row.
Attention is causal, so a row whose loss is read at position t alone is cut after token t+1. An expert that is
taken away from a whole sequence leaves the layers below as they are, so such a forward starts at its layer.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby

import torch

from cor_vllm.calibrate.config import CalibrationOptions
from cor_vllm.calibrate.interventions.measurement import Advance, Baseline, LayerMeasurement, active_experts
from cor_vllm.calibrate.interventions.prefix import Prefix
from cor_vllm.calibrate.model.batches import Row, batches, pad, rows_per_forward
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.text.stratify import Strata, locate


class PlainAlgorithm:
    """Measures one layer at a time; one step is one MoE layer.

    Args:
        model: the model.
        options: of them scopes, target, ablation, delta and intensity.
        sequences: the calibration sequences.
        base: their baseline.
        strata: their hard and easy positions.
        advance: is told the progress.
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
        self._model, self._options, self._sequences = model, options, sequences
        self._advance = advance
        starts = [0]
        for ids in sequences:
            starts.append(starts[-1] + len(ids) - 1)
        self._starts = starts
        self._losses = base.losses.double()
        self._hard_mask, self._easy_mask = strata.hard, strata.easy
        self._hard = locate(strata.hard, sequences)
        self._easy = locate(strata.easy, sequences)
        self._active = active_experts(model, base, strata)
        self._prefix = Prefix(model, sequences)
        self._done: list[LayerMeasurement] = []

    def work(self) -> list[int]:
        """How many rows each step will run; rows are the unit of progress."""
        others = len(self._sensitivity_rows()) + len(self._hard) * len(self._other_k())
        return [others + len(self._ablation_rows(layer)) for layer in range(self._model.num_layers)]

    def state(self, steps: int) -> dict[str, torch.Tensor]:
        """What `restore` needs to go on after so many steps."""
        return {
            f"{layer}/{field}": value
            for layer, measured in enumerate(self._done[:steps])
            for field, value in measured.tensors().items()
        }

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Take up a saved state and return the number of finished steps."""
        fields: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            layer, field = name.split("/")
            fields.setdefault(int(layer), {})[field] = tensor
        self._done = [LayerMeasurement.from_tensors(fields[layer]) for layer in range(len(fields))]
        return len(self._done)

    def step(self, layer: int) -> None:
        """Measure one layer and keep the result."""
        self._done.append(self.measure(layer))

    def result(self) -> list[LayerMeasurement]:
        """The loss changes of every MoE layer, once all steps are done."""
        return self._done

    def measure(self, layer: int) -> LayerMeasurement:
        """Measure every loss change of MoE layer `layer` (Eq. 3 and Eq. 5 to 7) in nats, float64."""
        hard, easy = self._sensitivity(layer)
        fewer, more = (
            self._at_hard(layer, k) if k in self._other_k() else None
            for k in (self._model.top_k - 1, self._model.top_k + 1)
        )
        return LayerMeasurement(hard, easy, self._active[layer], self._ablations(layer), fewer, more)

    def _run(
        self, rows: Sequence[Row], intervene: Callable[..., AbstractContextManager[None]]
    ) -> list[torch.Tensor]:
        """Loss minus baseline, float64: [1] at the row's position, or [S−1] if the row acts everywhere."""
        changes: list[torch.Tensor] = []
        for batch in batches(rows, self._sequences):
            input_ids = pad([ids for _, ids in batch])
            where = torch.zeros(input_ids.shape, dtype=torch.bool)
            for i, (row, _) in enumerate(batch):
                where[i, slice(None) if row.position is None else row.position] = True
            experts = torch.tensor([row.expert for row, _ in batch])[:, None].expand(input_ids.shape)
            with intervene(where, experts):
                losses = self._model.losses(input_ids).double()
            for (row, ids), values in zip(batch, losses, strict=True):
                start = self._starts[row.sequence]
                at = slice(0, len(ids) - 1) if row.position is None else slice(row.position, row.position + 1)
                changes.append(values[at] - self._losses[start : start + len(ids) - 1][at])
            self._advance(len(batch))
        return changes

    def _run_from(
        self, layer: int, rows: Sequence[Row], intervene: Callable[..., AbstractContextManager[None]]
    ) -> list[torch.Tensor]:
        """`_run` for rows that act everywhere, at MoE layer `layer`: the layers below run once a sequence."""
        self._prefix.move(self._model.layer_index[layer])
        changes: list[torch.Tensor] = []
        for sequence, group in groupby(rows, key=lambda row: row.sequence):
            length = len(self._sequences[sequence])
            start = self._starts[sequence]
            experts = torch.tensor([row.expert for row in group])[:, None].expand(-1, length)
            for block in experts.split(rows_per_forward(length)):
                with intervene(torch.ones(block.shape, dtype=torch.bool), block):
                    losses = self._prefix.losses(sequence, len(block)).double()
                changes += losses - self._losses[start : start + length - 1]
                self._advance(len(block))
        return changes

    def _sensitivity_rows(self) -> list[Row]:
        if self._options.perturb_scope == "sequence":
            return [Row(s) for s in range(len(self._sequences))]
        return [Row(s, t) for s, t in self._hard + self._easy]

    def _sensitivity(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        def scale(where: torch.Tensor, experts: torch.Tensor) -> AbstractContextManager[None]:
            return self._model.scale_output(
                layer, 1 + self._options.delta, where, self._options.perturb_target == "layer"
            )

        changes = torch.cat(self._run(self._sensitivity_rows(), scale))
        if self._options.perturb_scope == "sequence":
            return changes[self._hard_mask], changes[self._easy_mask]
        return changes[: len(self._hard)], changes[len(self._hard) :]

    def _ablation_rows(self, layer: int) -> list[Row]:
        active = self._active[layer].tolist()
        if self._options.scope == "token":
            return [Row(s, t, e) for (s, t), ids in zip(self._hard, active, strict=True) for e in ids]
        pairs = {(s, e) for (s, _), ids in zip(self._hard, active, strict=True) for e in ids}
        return [Row(s, None, e) for s, e in sorted(pairs)]

    def _ablations(self, layer: int) -> torch.Tensor:
        """Δℓ of each hard position without each of its active experts: [H, top_k]."""

        def take_away(where: torch.Tensor, experts: torch.Tensor) -> AbstractContextManager[None]:
            rule = self._model.routers[layer].without(experts.flatten(), self._options.ablation)
            return self._model.routing({layer: rule}, where)

        rows = self._ablation_rows(layer)
        if self._options.scope == "token":
            return torch.cat(self._run(rows, take_away)).view(len(self._hard), self._model.top_k)
        changes = self._run_from(layer, rows, take_away)
        by_pair = {(row.sequence, row.expert): change for row, change in zip(rows, changes, strict=True)}
        active = self._active[layer].tolist()
        hard = zip(self._hard, active, strict=True)
        values = [[by_pair[s, e][t].item() for e in ids] for (s, t), ids in hard]
        return torch.tensor(values, dtype=torch.float64)

    def _other_k(self) -> list[int]:
        """top_k − 1 and top_k + 1, if `--intensity marginal` asks for them and they exist."""
        if self._options.intensity != "marginal":
            return []
        model = self._model
        return [k for k in (model.top_k - 1, model.top_k + 1) if 1 <= k <= model.eligible_experts]

    def _at_hard(self, layer: int, top_k: int) -> torch.Tensor:
        """Δℓ of each hard position with `top_k` experts at this layer: [H]."""

        def with_k(where: torch.Tensor, experts: torch.Tensor) -> AbstractContextManager[None]:
            router = self._model.routers[layer]
            return self._model.routing({layer: lambda logits: router.route(logits, top_k=top_k)}, where)

        return torch.cat(self._run([Row(s, t) for s, t in self._hard], with_k))
