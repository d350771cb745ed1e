"""Copies of a checkpoint as people and their tools make them, in any of the forms that tools leave."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
ROUTER = (".gate.weight", ".router.weight")


def weights_of(folder: Path) -> Weights:
    """All tensors of a checkpoint in one file."""
    return load_file(folder / "model.safetensors")


def copy(folder: Path, to: Path, change: Callable[[Weights], Weights | None] = lambda weights: None) -> Path:
    """A copy in one file, with `change` made to its weights, in place or as a new dictionary."""
    shutil.copytree(folder, to)
    weights = weights_of(to)
    save(change(weights) or weights, to / "model.safetensors")
    return to


def save(weights: Weights, file: Path) -> None:
    """One safetensors file, as transformers writes it."""
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file, {"format": "pt"})


def shard(folder: Path, parts: int = 2) -> Path:
    """Split the single file of a checkpoint into `parts` and an index, in place."""
    weights = weights_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        save({name: weights[name] for name in names[part::parts]}, folder / file)
        weight_map.update(dict.fromkeys(names[part::parts], file))
    index(folder, weight_map)
    return folder


def index(folder: Path, weight_map: object) -> None:
    """Write the index that says which file holds which tensor."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def routers(weights: Weights) -> list[str]:
    """The names of all router weights, by layer."""
    return sorted(name for name in weights if name.endswith(ROUTER))


def cast(*dtypes: torch.dtype) -> Callable[[Weights], Weights]:
    """Every tensor through these dtypes, but the correction bias, which tools keep in float32."""

    def change(weights: Weights) -> Weights:
        for dtype in dtypes:
            weights = {n: t if n.endswith("correction_bias") else t.to(dtype) for n, t in weights.items()}
        return weights

    return change


def other_routers(weights: Weights) -> Weights:
    """Another model of the same shapes."""
    generator = torch.Generator().manual_seed(7)
    for name in routers(weights):
        values = weights[name]
        weights[name] = torch.randn(values.shape, generator=generator).to(values.dtype) * values.float().std()
    return weights


def folded(
    layer: int, with_router: bool = True, dtype: torch.dtype | None = None
) -> Callable[[Weights], None]:
    """AWQ: scales of factors between 1/2 and 2 out of the norm of a layer, into its router or not."""

    def change(weights: Weights) -> None:
        norm = f"model.layers.{layer}.post_attention_layernorm.weight"
        scales = 2 ** torch.linspace(-1, 1, weights[norm].numel())
        weights[norm] = (weights[norm].float() / scales).to(dtype or weights[norm].dtype)
        for name in routers(weights):
            if with_router and f".{layer}." in name:
                weights[name] = (weights[name].float() * scales).to(dtype or weights[name].dtype)

    return change
