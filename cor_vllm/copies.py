"""Is this router a copy of that one? By its values, whatever dtype stores them, and by what it reads.

A tool that copies a model rounds its values to another dtype and sometimes back. The values of a router are
therefore hashed after each cast that such tools make, and one of these hashes is the copy's own. No tolerance
is involved: a router that was trained further has none of them.

AWQ moves a scale for each channel of a router's input out of the norm and into the router, which leaves
router × norm as it was up to two roundings. Only that product can be compared then, and only with a
tolerance: by a sketch of it, a random projection with ±1 (Charikar et al. 2002, "count sketch"), whose
squared length is that of what was projected on average.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cor_vllm.checkpoint import RouterTensors
from cor_vllm.metadata import RouterInfo, TensorInfo

_CASTS: tuple[tuple[torch.dtype, ...], ...] = (
    (),
    (torch.float16,),
    (torch.bfloat16,),
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.float16),
)
SKETCH = 64  # numbers a sketch has
ROUNDING = 2.0**-8  # relative distance; two roundings to bfloat16 make 0.6 of it, to float16 less
RESCALED = 2.0**-5  # relative distance; training moves a router by less, AWQ by more
RETRAINED = 2.0**-3  # relative distance; training moves a norm by some percent, a quantiser by factors


@dataclass(frozen=True)
class Difference:
    """Decoder layers by what became of their router in the copy; a layer that is in none is the same."""

    other: tuple[int, ...] = ()  # another router
    rescaled: tuple[int, ...] = ()  # the same router, which reads something else: its norm has other scales
    retrained: tuple[int, ...] = ()  # the same router behind a norm that moved a little
    folded: tuple[
        int, ...
    ] = ()  # router and norm were rescaled against each other, their product is the same


def describe(router: RouterTensors) -> RouterInfo:
    """What a scores file keeps of a router.

    Args:
        router: weight [N, H], biases [N], norm [H], of any floating dtype.
    """
    weight = router.tensors["weight"].double()
    fits = router.norm is not None and weight.dim() == 2 and router.norm.shape == weight.shape[1:]
    return RouterInfo(
        layer=router.layer,
        tensors={
            name: TensorInfo(dtype=str(values.dtype).removeprefix("torch."), sha256=_hashes(values))
            for name, values in router.tensors.items()
        },
        sketch=sketch(weight),
        input_sketch=sketch(weight * router.norm.double()) if fits and router.norm is not None else None,
    )


def _hashes(values: torch.Tensor) -> list[str]:
    """SHA-256 of the values in float32, then of what each cast leaves of them; no hash twice.

    Each over the shape in words, a line break, and the values, little-endian.
    """
    exact = values.float()
    seen: list[torch.Tensor] = []
    for casts in _CASTS:
        rounded = exact
        for dtype in casts:
            rounded = rounded.to(dtype)
        rounded = rounded.float()
        if not any(torch.equal(rounded, other) for other in seen):
            seen.append(rounded)
    shape = f"{list(values.shape)}\n".encode()
    return [hashlib.sha256(shape + v.contiguous().numpy().astype("<f4").tobytes()).hexdigest() for v in seen]


def sketch(values: torch.Tensor) -> list[float]:
    """Sums over the values with fixed random signs: value i, times its sign, goes into sum i mod SKETCH.

    Args:
        values: float64, any shape; it enters by its elements' order alone.

    Returns:
        SKETCH numbers of seven digits, the same on every machine.
    """
    flat = values.flatten().numpy()
    bits = np.frombuffer(hashlib.shake_256(b"cor-vllm router sketch").digest(-(-flat.size // 8)), np.uint8)
    signed = flat * (1.0 - 2.0 * np.unpackbits(bits)[: flat.size])
    sums = np.pad(signed, (0, -flat.size % SKETCH)).reshape(-1, SKETCH).sum(0)
    return [float(f"{value:.7g}") for value in sums]


def compare(original: Sequence[RouterInfo], copy: Sequence[RouterInfo]) -> Difference:
    """Tell the layers of a copy that are not the original's.

    Args:
        original: of every MoE layer of the model that was measured.
        copy: of the same layers of the model to be served, in the same order.

    Source: `docs/reference/scores-file.md`, "What ties a file to a model".
    """
    kinds: dict[str, list[int]] = {"other": [], "rescaled": [], "retrained": [], "folded": []}
    for ours, theirs in zip(original, copy, strict=True):
        if kind := _compare_layer(ours, theirs):
            kinds[kind].append(theirs.layer)
    return Difference(**{kind: tuple(layers) for kind, layers in kinds.items()})


def _compare_layer(ours: RouterInfo, theirs: RouterInfo) -> str:
    if ours.tensors.keys() != theirs.tensors.keys():
        return "other"
    differ = {name for name in ours.tensors if not _is_cast(ours.tensors[name], theirs.tensors[name])}
    read = _distance(ours.input_sketch, theirs.input_sketch)
    if not differ:
        if read is None or read <= ROUNDING:
            return ""
        return "retrained" if read <= RETRAINED else "rescaled"
    moved = _distance(ours.sketch, theirs.sketch)
    # A router that hardly moved was trained, not rescaled, and its values must then be the original's: if
    # a few channels are most of what a router reads, the product alone does not see a light fine-tune.
    if differ == {"weight"} and read is not None and read <= ROUNDING and moved and moved > RESCALED:
        return "folded"
    return "other"


def _is_cast(ours: TensorInfo, theirs: TensorInfo) -> bool:
    """Are the values of one the other's, perhaps rounded? The file may have been made from the copy."""
    return theirs.sha256[0] in ours.sha256 or ours.sha256[0] in theirs.sha256


def _distance(ours: list[float] | None, theirs: list[float] | None) -> float | None:
    """The distance of two sketches, relative to the length of the first; None if one is missing."""
    if ours is None or theirs is None:
        return None
    a, b = np.array(ours), np.array(theirs)
    length = float(np.linalg.norm(a))
    return float(np.linalg.norm(a - b)) / length if length else float(np.any(b))
