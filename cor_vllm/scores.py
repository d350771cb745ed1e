"""The scores file `cor-scores/1`: write, read, validate.

One safetensors file (tensor_file.py) holds every tensor of a calibration and, as JSON in its metadata, where
they came from.
"""

import dataclasses
import os

import torch

from cor_vllm.errors import CorError
from cor_vllm.metadata import ScoresConfig
from cor_vllm.modes import SWAP_RATE_LAMBDAS as SWAP_RATE_LAMBDAS
from cor_vllm.modes import Tables
from cor_vllm.tensor_file import Kind
from cor_vllm.tensor_file import digest as digest

FORMAT = "cor-scores/1"
RECALIBRATE = "write it again with `cor-vllm calibrate`"


class ScoresError(CorError):
    """A scores file that cannot be used: one line with the field, what it holds, and what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """A calibration result. M MoE layers, N routed experts; losses in nats (docs/reference/method.md)."""

    layer_index: torch.Tensor  # [M] int32, decoder layer number, ascending
    k: torch.Tensor  # [M] int32, experts per token of each layer
    cei: torch.Tensor  # [M, N] float32, min-max normalised within the layer
    cei_raw: torch.Tensor  # [M, N] float32, mean rescue gain, nats
    cei_sem: torch.Tensor  # [M, N] float32, standard error of cei_raw, 0 below 2 samples
    cei_count: torch.Tensor  # [M, N] int32, hard positions behind each value
    rki: torch.Tensor  # [M] float32, relative knowledge intensity R_l
    sensitivity_hard: torch.Tensor  # [M] float32, S_l on hard positions, nats
    sensitivity_easy: torch.Tensor  # [M] float32, S_l on easy positions, nats
    router_prob: torch.Tensor  # [M, N] float32, mean router probability on hard positions
    swap_rate: torch.Tensor  # [M, 5] float32, share of slots changed at SWAP_RATE_LAMBDAS
    config: ScoresConfig

    @property
    def num_layers(self) -> int:
        """M, the number of MoE layers."""
        return self.layer_index.shape[0]

    @property
    def num_experts(self) -> int:
        """N, the number of routed experts per layer."""
        return self.cei.shape[1]

    @property
    def tables(self) -> Tables:
        """What the routing needs of the file."""
        index, k = self.layer_index.tolist(), self.k.tolist()
        return Tables(index, self.config.model.top_k, k, self.cei, self.swap_rate)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its name in the file."""
        return {name: getattr(self, name) for name in _DTYPES}


_DTYPES = {
    f.name: torch.int32 if f.name in ("layer_index", "k", "cei_count") else torch.float32
    for f in dataclasses.fields(Scores)
    if f.name != "config"
}
_PER_EXPERT = ("cei", "cei_raw", "cei_sem", "cei_count", "router_prob")
_KIND = Kind(FORMAT, "scores file", ScoresError, RECALIBRATE, _DTYPES, ScoresConfig)


def load(path: str | os.PathLike[str]) -> Scores:
    """Read and validate a scores file.

    Args:
        path: the safetensors file.

    Returns:
        The scores, every tensor on the CPU.

    Raises:
        ScoresError: one line naming the field, its value and the remedy.
    """
    return parse(read_bytes(path), os.fspath(path))


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The file's bytes, or a ScoresError if it is not a readable regular file of a plausible size."""
    return _KIND.read_bytes(path)


def parse(data: bytes, name: str) -> Scores:
    """Decode and validate the bytes of a scores file; `name` stands in the error messages."""
    tensors, config = _KIND.parse(data, name)
    scores = Scores(**tensors, config=config)
    validate(scores, name)
    return scores


def save(path: str | os.PathLike[str], scores: Scores) -> None:
    """Validate and write a scores file atomically: the final name never holds half a file.

    Raises:
        ScoresError: the scores break the format, or `path` is a folder, a device or another special file.
        OSError: the file cannot be written (disk full, no permission); nothing is left behind.
    """
    validate(scores, os.fspath(path))
    _KIND.save(path, scores.tensors(), scores.config)


def validate(scores: Scores, name: str) -> None:
    """Check dtypes, shapes, ranges and finiteness; raise ScoresError with the first violation."""
    tensors = scores.tensors()
    _KIND.check_dtypes(tensors, name)
    layers = scores.layer_index.shape
    if len(layers) != 1 or layers[0] < 1:
        raise ScoresError(f"{name}: layer_index: shape {list(layers)}, must be [M], M ≥ 1; {RECALIBRATE}")
    m, n = layers[0], scores.config.model.num_experts
    for field, tensor in tensors.items():
        shape = [m, n] if field in _PER_EXPERT else [m, 5] if field == "swap_rate" else [m]
        if list(tensor.shape) != shape:
            raise ScoresError(
                f"{name}: {field}: shape {list(tensor.shape)}, must be {shape} for {m} MoE layers of {n} "
                f"experts (config.model.num_experts); {RECALIBRATE}"
            )
    _validate_values(scores, name)


def _validate_values(scores: Scores, name: str) -> None:
    def refuse(field: str, bad: torch.Tensor, rule: str) -> None:
        _KIND.refuse(name, field, getattr(scores, field), bad, rule)

    for field, tensor in scores.tensors().items():
        if tensor.dtype.is_floating_point:
            refuse(field, ~torch.isfinite(tensor), "finite")
    for field in ("cei", "router_prob", "swap_rate"):
        refuse(field, (getattr(scores, field) < 0) | (getattr(scores, field) > 1), "in [0, 1]")
    for field in ("cei_sem", "cei_count", "layer_index"):
        refuse(field, getattr(scores, field) < 0, "≥ 0")
    model, budget, index = scores.config.model, scores.config.budget, scores.layer_index
    refuse("k", (scores.k < 1) | (scores.k > model.num_experts), f"in [1, {model.num_experts}]")
    descending = torch.zeros_like(index, dtype=torch.bool)
    descending[1:] = index[1:] <= index[:-1]
    refuse("layer_index", descending, "ascending")
    refuse("layer_index", index >= model.num_hidden_layers, f"below {model.num_hidden_layers} layers")
    if model.top_k > model.num_experts:
        raise ScoresError(f"{name}: config.model.top_k: {model.top_k}, must be at most {model.num_experts} "
                          f"(num_experts); {RECALIBRATE}")  # fmt: skip
    if int(scores.k.sum()) != budget.sum:
        raise ScoresError(
            f"{name}: config.budget.sum: {budget.sum}, but k sums to {int(scores.k.sum())}; {RECALIBRATE}"
        )
