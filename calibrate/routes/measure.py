"""The measurement of an analysis, step by step, with the layers sent to the way that measures them."""

import sys
from collections.abc import Mapping, Sequence

import torch

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.interventions.checks import named
from cor_vllm.calibrate.interventions.measurement import Advance
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.offload import held
from cor_vllm.calibrate.routes.closed_form import last_layer_utilities
from cor_vllm.calibrate.routes.options import AnalysisOptions
from cor_vllm.calibrate.routes.replay import Replay
from cor_vllm.calibrate.routes.standard import LastInputs, ScoredText
from cor_vllm.calibrate.routes.utilities import Standard, Utilities

CLOSED = "closed/"  # how the closed form's tensors of a saved state are named


def chosen_layers(options: AnalysisOptions, layer_index: Sequence[int]) -> list[int]:
    """The decoder layers that --layers names, ascending.

    Raises:
        CalibrationError: one of them has no experts.
    """
    if options.layers == "final":
        return [layer_index[-1]]
    if options.layers == "all":
        return list(layer_index)
    wrong = sorted(set(options.layers) - set(layer_index))
    if wrong:
        raise CalibrationError(
            f"--layers: {named(wrong)} of this model cannot be analysed; those with experts are "
            f"{', '.join(map(str, layer_index))}"
        )
    return sorted(set(options.layers))


class RouteMeasurement:
    """Utilities of the chosen layers: the last decoder layer in closed form, all others by replay.

    Args:
        model: the model.
        text: its scored positions.
        standard: of `read_standard`.
        last: of `read_standard`; None if the last decoder layer has no experts.
        options: layers, draws, memory.
        advance: is called with the units of work that are done.
    """

    def __init__(
        self, model: MoeModel, text: ScoredText, standard: Standard, last: LastInputs | None,
        options: AnalysisOptions, advance: Advance = lambda rows: None,
    ) -> None:  # fmt: skip
        self._model, self._standard, self._last, self._advance = model, standard, last, advance
        self._draws = options.draws
        layers = chosen_layers(options, model.layer_index)
        closed = last is not None and layers[-1] == model.layer_index[-1]
        self._closed = int(closed)  # steps
        self._found: list[Utilities] = []
        others = [model.layer_index.index(layer) for layer in (layers[:-1] if closed else layers)]
        self._replay = None
        if others or options.joint:
            self._replay = Replay(
                model, text, standard, others, options.joint, self._draws, options.max_memory, advance
            )

    def work(self) -> list[int]:
        """The units of each step: tokens of the closed form, rows of the replay."""
        replayed = self._replay.work() if self._replay else []
        return [len(self._standard.keys)] * self._closed + replayed

    def step(self, index: int) -> None:
        """Do one step: the closed form comes first."""
        if index >= self._closed:
            assert self._replay is not None, "there are no further steps"
            self._replay.step(index - self._closed)
            return
        assert self._last is not None, "the closed form has its inputs"
        decoder = self._model.model
        with held(self._model.decoder_layers[-1], decoder.model.norm, decoder.lm_head):
            self._found = [
                last_layer_utilities(self._model, self._last, self._standard, self._draws, self._advance)
            ]

    def state(self, steps: int) -> dict[str, torch.Tensor]:
        """What `restore` needs to go on after so many steps."""
        tensors = {f"{CLOSED}{name}": values for one in self._found for name, values in one.tensors().items()}
        if self._replay is not None and steps > self._closed:
            tensors |= self._replay.state(steps - self._closed)
        return tensors

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Take up a saved state and return the number of finished steps."""
        fields = {name.removeprefix(CLOSED): t for name, t in tensors.items() if name.startswith(CLOSED)}
        if fields:
            self._found = [Utilities.from_tensors(self._model.layer_index[-1], fields)]
        rest = {name: values for name, values in tensors.items() if not name.startswith(CLOSED)}
        return len(self._found) + (self._replay.restore(rest) if self._replay else 0)

    def result(self) -> list[Utilities]:
        """By layer, then jointly, once all steps are done.

        Raises:
            CalibrationError: a log-probability is not finite.
        """
        found = [*(self._replay.result() if self._replay else []), *self._found]
        found.sort(key=lambda one: sys.maxsize if one.layer is None else one.layer)
        for one in found:
            if not one.utility.isfinite().all():
                raise CalibrationError(
                    f"routes {'of all layers' if one.layer is None else f'at {named([one.layer])}'} gave "
                    f"log-probabilities that are not finite in {self._model.model.dtype}; try --dtype "
                    "float32, or check the checkpoint"
                )
        return found
