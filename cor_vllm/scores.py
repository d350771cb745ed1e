"""The scores file `cor-scores/1`: write, read, validate.

One safetensors file holds every tensor of a calibration and, as JSON in its metadata, where they came from.
Reading executes nothing, imports nothing and opens no other file; nothing is allocated on the word of a
header, only the file's own bytes.
"""

import dataclasses
import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save

from cor_vllm.errors import CorError, invalid, one_line
from cor_vllm.metadata import ScoresConfig
from cor_vllm.modes import SWAP_RATE_LAMBDAS as SWAP_RATE_LAMBDAS
from cor_vllm.modes import Tables

FORMAT = "cor-scores/1"
MAX_FILE_BYTES = 1 << 28  # 1,000 layers of 2,048 experts need 33 MB
MAX_HEADER_BYTES = 1 << 22
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
    if not os.fspath(path):
        raise ScoresError("the path is empty; give that of a scores file")
    try:
        with open(path, "rb", opener=_open_without_blocking) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise ScoresError(f"{path}: not a regular file; give the path of a scores file")
            if info.st_size > MAX_FILE_BYTES:
                raise ScoresError(
                    f"{path}: {info.st_size} bytes, more than {MAX_FILE_BYTES}; this is no scores file"
                )
            return file.read()
    except IsADirectoryError:
        raise ScoresError(f"{path}: is a directory; give the path of a scores file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ScoresError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ScoresError(f"{path}: cannot be read ({reason}); check the path and its permissions") from None


def _open_without_blocking(path: str, flags: int) -> int:
    # A FIFO would block the open for ever; the flag does nothing to a regular file.
    return os.open(path, flags | os.O_NONBLOCK)


def digest(data: bytes) -> str:
    """SHA-256 of a file's bytes: what compile caches and prefix caches are keyed by."""
    return hashlib.sha256(data).hexdigest()


def parse(data: bytes, name: str) -> Scores:
    """Decode and validate the bytes of a scores file; `name` stands in the error messages."""
    header = _header(data, name)
    try:
        tensors = safetensors_load(data)
    except (SafetensorError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ScoresError(
            f"{name}: not a complete safetensors file ({one_line(error)}); {RECALIBRATE}"
        ) from None
    config = _config(header.get("__metadata__"), name)
    for field in _DTYPES:
        if field not in tensors:
            raise ScoresError(f"{name}: {field}: missing; {RECALIBRATE}")
    scores = Scores(**{field: tensors[field] for field in _DTYPES}, config=config)
    validate(scores, name)
    return scores


def save(path: str | os.PathLike[str], scores: Scores) -> None:
    """Validate and write a scores file atomically: the final name never holds half a file.

    Raises:
        ScoresError: the scores break the format, or `path` is a folder, a device or another special file.
        OSError: the file cannot be written (disk full, no permission); nothing is left behind.
    """
    target = Path(path)
    validate(scores, os.fspath(target))
    if target.exists() and not target.is_file():  # it would be replaced
        raise ScoresError(f"{target}: is not a regular file; give the name of a file")
    metadata = {"format": FORMAT, "config": scores.config.model_dump_json(by_alias=True)}
    data = _ordered(safetensors_save({n: t.contiguous() for n, t in scores.tensors().items()}, metadata))
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _ordered(data: bytes) -> bytes:
    """The same file with its header's keys in order: safetensors writes the metadata in any."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the tensors to 8 bytes
    return len(header).to_bytes(8, "little") + header + data[end:]


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _header(data: bytes, name: str) -> dict[str, object]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ScoresError(f"{name}: header: {len(data)} bytes do not hold it; the file is cut off or no "
                          f"safetensors file, {RECALIBRATE}")  # fmt: skip
    if length > MAX_HEADER_BYTES:
        raise ScoresError(f"{name}: header: {length} bytes, more than {MAX_HEADER_BYTES}; {RECALIBRATE}")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise ScoresError(f"{name}: header: not JSON ({one_line(error)}); {RECALIBRATE}") from None
    if not isinstance(header, dict):
        raise ScoresError(f"{name}: header: not a JSON object; {RECALIBRATE}")
    return header


def _config(metadata: object, name: str) -> ScoresConfig:
    values = metadata if isinstance(metadata, dict) else {}
    found = values.get("format")
    if found != FORMAT:
        remedy = "update cor-vllm" if str(found).startswith("cor-scores/") else RECALIBRATE
        raise ScoresError(f"{name}: format: {one_line(repr(found))}, this version reads {FORMAT!r}; {remedy}")
    try:
        return ScoresConfig.model_validate_json(values.get("config") or "")
    except ValidationError as error:
        where, message, value = invalid(error)
        field = one_line(".".join(["config", *where]))
        raise ScoresError(f"{name}: {field}: {message}, got {value}; {RECALIBRATE}") from None


def validate(scores: Scores, name: str) -> None:
    """Check dtypes, shapes, ranges and finiteness; raise ScoresError with the first violation."""
    tensors = scores.tensors()
    for field, dtype in _DTYPES.items():
        if tensors[field].dtype != dtype:
            raise ScoresError(
                f"{name}: {field}: dtype {tensors[field].dtype}, must be {dtype}; {RECALIBRATE}"
            )
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
        if bad.any():
            at = bad.nonzero()[0].tolist()
            value = getattr(scores, field)[tuple(at)].item()
            raise ScoresError(f"{name}: {field}: {value} at {at}, must be {rule}; {RECALIBRATE}")

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
