"""Keeps sequences at the entrance of one decoder layer, so that the layers below an intervention run once."""

from collections.abc import Sequence

import torch

from cor_vllm.calibrate.model.layers import Arguments, enter, run
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.offload import held


class Prefix:
    """The unperturbed hidden states of all sequences, moved from layer to layer; they wait on the host."""

    def __init__(self, model: MoeModel, sequences: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._input_ids = [torch.tensor([list(ids)]) for ids in sequences]  # [1, S] each
        self._layer = 0
        self._hidden: list[torch.Tensor] = []  # [1, S, D] each, what goes into layer `_layer`
        self._arguments: list[Arguments] = []

    @torch.inference_mode()
    def move(self, layer: int) -> None:
        """Move all sequences to the entrance of decoder layer `layer`."""
        if not self._hidden or layer < self._layer:
            self._enter()
        for index in range(self._layer, layer):
            with held(self._model.decoder_layers[index]):
                self._hidden = [self._through(index, s, hidden) for s, hidden in enumerate(self._hidden)]
        self._layer = layer

    def _enter(self) -> None:
        decoder, device = self._model.model.model, self._model.device
        with held(self._model.model.get_input_embeddings()):
            entered = [enter(decoder, ids.to(device)) for ids in self._input_ids]
        self._hidden = [hidden.cpu() for hidden, _ in entered]
        self._arguments = [arguments for _, arguments in entered]
        self._layer = 0

    def _through(self, index: int, sequence: int, hidden: torch.Tensor) -> torch.Tensor:
        arguments = self._arguments[sequence].of_layer[index]
        return run(self._model.decoder_layers[index], hidden.to(self._model.device), arguments).cpu()

    @torch.inference_mode()
    def losses(self, sequence: int, rows: int) -> torch.Tensor:
        """ℓ(t) of `rows` copies of a sequence, run from here to the end under the active interventions.

        Returns:
            [rows, S−1] float32 on the CPU, nats.
        """
        model, arguments = self._model, self._arguments[sequence]
        hidden = self._hidden[sequence].to(model.device).expand(rows, -1, -1)
        for index in range(self._layer, len(model.decoder_layers)):
            hidden = run(model.decoder_layers[index], hidden, arguments.of_layer[index])
        input_ids = self._input_ids[sequence].to(model.device).expand(rows, -1)
        return model.sequence_losses(model.model.model.norm(hidden), input_ids)
