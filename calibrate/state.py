"""What a killed run leaves: finished layers in `<output>.partial`, from which the same command resumes."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save

from cor_vllm.calibrate.measure import LayerMeasurement

FORMAT = "cor-partial/1"
BASELINE_TOLERANCE = 1e-3  # nats; other weights under the same routers differ by more


class PartialState:
    """The partial state beside one output file.

    Args:
        output: the final scores file.
        key: hash of everything that determines the measurements; state of another key is never used.
        baseline: [P] float32 unperturbed losses, nats: tells changed weights, which the key cannot see.
    """

    def __init__(self, output: Path, key: str, baseline: torch.Tensor) -> None:
        self.path = partial_path(output)
        self._key = key
        self._baseline = baseline

    def load(self) -> tuple[dict[int, LayerMeasurement], str]:
        """The finished layers, and one line to tell the user ("" where there was no state)."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return {}, ""
        try:
            tensors = safetensors_load(data)
        except SafetensorError:
            return {}, f"{self.path} is damaged: starting from the first layer"
        baseline = tensors.pop(f"{self._key}/baseline", None)
        if baseline is None:
            return {}, f"{self.path} is of another calibration: starting from the first layer"
        same = baseline.shape == self._baseline.shape
        if not same or not torch.allclose(baseline, self._baseline, rtol=0, atol=BASELINE_TOLERANCE):
            return {}, f"{self.path} is of other model weights: starting from the first layer"
        fields: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            layer, field = name.split("/")
            fields.setdefault(int(layer), {})[field] = tensor
        done = {layer: LayerMeasurement.from_tensors(values) for layer, values in fields.items()}
        return done, f"resuming from {self.path}, layers done: {len(done)}"

    def save(self, done: Mapping[int, LayerMeasurement]) -> None:
        """Write all finished layers; the file is replaced in one step, never half written."""
        tensors = {f"{self._key}/baseline": self._baseline}
        for layer, measurement in done.items():
            tensors |= {
                f"{layer}/{field}": value.contiguous() for field, value in measurement.tensors().items()
            }
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            temporary.write_bytes(safetensors_save(tensors, {"format": FORMAT}))
            os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Delete the state; the result is complete."""
        self.path.unlink(missing_ok=True)


def partial_path(output: Path) -> Path:
    """Where the state of a calibration into `output` lies."""
    return output.with_name(f"{output.name}.partial")
