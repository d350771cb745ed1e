"""The router file `cor-router/1`: one layer's router, trained anew, that takes the place of the model's own.

One safetensors file (tensor_file.py) holds the weight and, as JSON in its metadata, which model it belongs
to, how it was trained, and what a held-out check said of it.

Source: arXiv 2605.07260, whose update changes the router of the final layer alone.
"""

import dataclasses
import functools
import hashlib
import os
from typing import Literal

import torch
from pydantic import Field

from cor_vllm.errors import CorError
from cor_vllm.metadata import ModelInfo, Section, Sha256
from cor_vllm.tensor_file import Kind

FORMAT = "cor-router/1"
MAX_DRIFT = 10.0  # a router that moved by more than this is no update of the one that it is compared with
_REMEDY = "write it again with `cor-vllm reroute`"
DtypeName = Literal["float32", "bfloat16", "float16"]
_SERVE_WITHOUT = "serve without --cor-router"


class OverlayError(CorError):
    """A router file that cannot be used: one line with the field, what it holds, and what to do."""


class TrainingInfo(Section):
    """How the router was trained: the options of `cor-vllm reroute`, and on what."""

    objective: Literal["none", "epo", "margin", "ce"]  # none: the weight is the model's own
    learning_rate: float
    kl: float = Field(ge=0)  # weight of the divergence from the model's own router
    beta: float
    tau: float  # nats; a position with a lower loss gives no gradient
    routes: int  # sampled for a position
    pool: int  # experts that they are sampled from
    temperature: float
    epochs: int
    batch: int
    steps: int = Field(ge=0)
    debias: bool
    seed: int
    corpus: str
    corpus_sha256: Sha256
    positions: int  # trained on
    documents: int  # that they are from


class HeldoutBin(Section):
    """Held-out positions of one kind; the figures are None if there are no such positions."""

    positions: int = Field(ge=0)
    documents: int = Field(ge=0)
    base: float | None  # mean loss with the model's own router, nats
    change: float | None  # mean change of the loss, nats
    low: float | None  # 95 % interval of the mean change
    high: float | None
    median: float | None  # of the changes, nats
    win_rate: float | None  # share of positions whose loss fell


class OverlayConfig(Section):
    """The `config` object of a router file (docs/reference/router-file.md)."""

    model: ModelInfo  # the model whose router it replaces, with the routers of all layers
    dtype: DtypeName  # that the weight was rounded to and is served in
    training: TrainingInfo
    heldout: dict[str, HeldoutBin]  # "all", and by the model's own probability of the token
    diagnostics: dict[str, float]
    drift: float = Field(ge=0)  # ‖W − W₀‖ / ‖W₀‖, Frobenius
    versions: dict[str, str]

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch names it."""
        return _TORCH_DTYPES[self.dtype]

    def harm(self) -> str | None:
        """One line unless the held-out check shows that the router lowers the loss, else None."""
        if self.training.objective == "none":
            return (
                "this router is the model's own, since no update lowered the held-out loss; "
                f"{_SERVE_WITHOUT}, which does the same"
            )
        found = self.heldout.get("all")
        if found is None or found.change is None or found.low is None or found.high is None:
            return f"no held-out check says that this router lowers the loss; {_SERVE_WITHOUT}"
        if found.high < 0:
            return None
        return (
            f"held-out check: this router does not lower the loss (change {found.change:+.4f}, 95 % interval "
            f"[{found.low:+.4f}, {found.high:+.4f}] nats); {_SERVE_WITHOUT}"
        )


_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True, eq=False)
class RouterOverlay:
    """Another router for one layer of a model. N routed experts, H numbers in a hidden state."""

    layer_index: torch.Tensor  # [1] int32, decoder layer number
    router_weight: torch.Tensor  # [1, N, H] float32, values that config.dtype can hold
    config: OverlayConfig

    @property
    def layer(self) -> int:
        """The decoder layer whose router it replaces."""
        return int(self.layer_index)

    @property
    def weight(self) -> torch.Tensor:
        """[N, H] float32, the router's weight."""
        return self.router_weight[0]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the layer, the shape and the values: files with the same ones route alike."""
        head = f"{self.layer} {list(self.weight.shape)}\n".encode()
        values = self.weight.contiguous().numpy().astype("<f4").tobytes()
        return hashlib.sha256(head + values).hexdigest()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by its name in the file."""
        return {name: getattr(self, name) for name in _DTYPES}


_DTYPES = {"layer_index": torch.int32, "router_weight": torch.float32}
_KIND = Kind(FORMAT, "router file", OverlayError, _REMEDY, _DTYPES, OverlayConfig)


def load(path: str | os.PathLike[str]) -> RouterOverlay:
    """Read and validate a router file.

    Args:
        path: the safetensors file.

    Returns:
        The overlay, its tensors on the CPU.

    Raises:
        OverlayError: one line naming the field, its value and the remedy.
    """
    return parse(read_bytes(path), os.fspath(path))


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The file's bytes, or an OverlayError if it is not a readable regular file of a plausible size."""
    return _KIND.read_bytes(path)


def is_overlay(data: bytes) -> bool:
    """Whether the bytes of a file say that they are a router file, of any version."""
    return _KIND.is_format_of(data)


def parse(data: bytes, name: str) -> RouterOverlay:
    """Decode and validate the bytes of a router file; `name` stands in the error messages."""
    tensors, config = _KIND.parse(data, name)
    overlay = RouterOverlay(**tensors, config=config)
    validate(overlay, name)
    return overlay


def save(path: str | os.PathLike[str], overlay: RouterOverlay) -> None:
    """Validate and write a router file atomically: the final name never holds half a file.

    Raises:
        OverlayError: the overlay breaks the format, or `path` is a folder, a device or another special file.
        OSError: the file cannot be written (disk full, no permission); nothing is left behind.
    """
    validate(overlay, os.fspath(path))
    _KIND.save(path, overlay.tensors(), overlay.config)


def validate(overlay: RouterOverlay, name: str) -> None:
    """Check dtypes, shapes, ranges and finiteness; raise OverlayError with the first violation."""
    config, model = overlay.config, overlay.config.model
    _KIND.check_dtypes(overlay.tensors(), name)
    if list(overlay.layer_index.shape) != [1]:
        raise OverlayError(f"{name}: layer_index: shape {list(overlay.layer_index.shape)}, must be [1]; "
                           f"{_REMEDY}")  # fmt: skip
    shape, n = list(overlay.router_weight.shape), model.num_experts
    if len(shape) != 3 or shape[:2] != [1, n] or not shape[2]:
        raise OverlayError(f"{name}: router_weight: shape {shape}, must be [1, {n}, hidden size] for {n} "
                           f"experts (config.model.num_experts); {_REMEDY}")  # fmt: skip
    _validate_values(overlay, name)
    for field, value, ok, rule in (
        ("drift", config.drift, config.drift <= MAX_DRIFT, f"at most {MAX_DRIFT:g}"),
        ("model.top_k", model.top_k, model.top_k <= n, f"at most {n} (num_experts)"),
        ("model.router_overlay", model.router_overlay, model.router_overlay is None, "absent"),
    ):
        if not ok:
            raise OverlayError(f"{name}: config.{field}: {value}, must be {rule}; {_REMEDY}")


def _validate_values(overlay: RouterOverlay, name: str) -> None:
    config, weight, index = overlay.config, overlay.router_weight, overlay.layer_index
    layers = config.model.num_hidden_layers
    outside = (index < 0) | (index >= layers)
    _KIND.refuse(name, "layer_index", index, outside, f"in [0, {layers}), the model's layers")
    if config.model.routers is not None:
        having = [router.layer for router in config.model.routers]
        bare = ~torch.isin(index, torch.tensor(having, dtype=index.dtype))
        _KIND.refuse(name, "layer_index", index, bare, "a layer that has a router (config.model.routers)")
    _KIND.refuse(name, "router_weight", weight, ~torch.isfinite(weight), "finite")
    lost = _rounded(weight, config) != weight
    _KIND.refuse(name, "router_weight", weight, lost, f"a value of {config.dtype} (config.dtype)")


def _rounded(weight: torch.Tensor, config: OverlayConfig) -> torch.Tensor:
    return weight.to(config.torch_dtype).float()


def random_like(overlay: RouterOverlay, base_weight: torch.Tensor, seed: int) -> RouterOverlay:
    """A control for an overlay: a router that is as far from the model's own, in a random direction.

    Args:
        overlay: whose layer, dtype and distance it takes on.
        base_weight: [N, H], the model's own router of that layer, any floating dtype.
        seed: of the Gaussian direction.

    Returns:
        W₀ + ΔW, rounded to `config.dtype`, where ΔW is Gaussian and has the Frobenius norm of the overlay's
        own difference from W₀. It has no held-out check and no diagnostics.
    """
    base = _rounded(base_weight.detach().cpu(), overlay.config).double()
    distance = (overlay.weight.double() - base).norm()
    direction = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = _rounded(base + direction * (distance / direction.norm()), overlay.config)
    drift = float((weight.double() - base).norm() / base.norm())
    config = overlay.config.model_copy(update={"drift": drift, "heldout": {}, "diagnostics": {}})
    return dataclasses.replace(overlay, router_weight=weight[None], config=config)
