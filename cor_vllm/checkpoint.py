"""The routers in a checkpoint's files: which files count, which tensors are routers, which are quantised."""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cor_vllm.errors import CorError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Tensors by their names in the published checkpoints: Qwen, OLMoE, DeepSeek, GLM (mlp.gate), Mixtral
# (block_sparse_moe.gate), GPT-OSS (mlp.router). A dense layer's mlp.gate_proj does not match, nor do the
# heads that predict further tokens (mtp.layers.0) or another tower's layers.
TENSORS = ("weight", "bias", "e_score_correction_bias")  # in the order in which a layer's are hashed
_DECODER = r"^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\."
_ROUTER = re.compile(_DECODER + r"(?:mlp|block_sparse_moe)\.(?:gate|router)\.(.+)$")
_NORM = re.compile(_DECODER + r"post_attention_layernorm\.weight$")  # its output is what the router reads
_FLOATS = ("F64", "F32", "F16", "BF16")


class FingerprintError(CorError):
    """A checkpoint whose routers cannot be read: one line with the cause and the remedy."""


@dataclasses.dataclass(frozen=True)
class RouterTensors:
    """One layer's router as stored: N experts, hidden size H."""

    layer: int  # decoder layer number
    tensors: dict[str, torch.Tensor]  # weight [N, H], biases [N]; by the names in TENSORS, in that order
    norm: torch.Tensor | None  # [H], weight of the RMSNorm before the router; None if no file has it


def transformers_files(folder: Path) -> list[Path]:
    """The weight files that transformers loads from a folder: `model.safetensors`, else what the index names.

    Raises:
        FingerprintError: there is neither, or the index is broken or names a file that is not there.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return indexed_files(folder)
    if not any(folder.glob("*.safetensors")):
        raise FingerprintError(
            f"{folder}: no *.safetensors file; a scores file can only be matched to a safetensors checkpoint"
        )
    raise FingerprintError(
        f"{folder}: neither {SINGLE} nor {INDEX}, so nothing says which of the files count; download the "
        "model again"
    )


def indexed_files(folder: Path) -> list[Path]:
    """The files that a folder's index names, sorted by name.

    Raises:
        FingerprintError: the index is broken, or names a file that is not there.
    """
    names = weight_names(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FingerprintError(
            f"{folder}: {', '.join(missing)} is missing, though {INDEX} names it; download the model again"
        )
    return [folder / name for name in names]


def weight_names(folder: Path) -> list[str]:
    """The weight files that belong into a folder: those of its index, sorted; without one, the single file's.

    Raises:
        FingerprintError: the index is not readable, or names a file in another folder, which vLLM does not
            load and this does not open.
    """
    index = folder / INDEX
    if not index.is_file():
        return [SINGLE]
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
        if not names:
            raise ValueError("it is empty")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FingerprintError(
            f"{index}: has no weight_map that could be used ({type(error).__name__}: {error}); download the "
            "model again"
        ) from None
    for name in names:
        if not isinstance(name, str) or not name or re.search(r"[/\\\0]", name) or name in (".", ".."):
            raise FingerprintError(f"{index}: names {name!r}, which is not a file of this folder; download "
                                   "the model again")  # fmt: skip
    return names


def router_layers(files: Sequence[Path], num_hidden_layers: int) -> Iterator[RouterTensors]:
    """Every layer's router in a list of files, in layer order; of a tensor in two files the last file's.

    Layers beyond the model's own, which predict further tokens (DeepSeek-V3, GLM-4-MoE), are left out.

    Args:
        files: one or more safetensors files of one folder, in the order in which they are loaded.
        num_hidden_layers: decoder layers of the model.

    Raises:
        FingerprintError: a file is not readable, routers are quantised, a value is not finite, or two tensors
            claim one router.
    """
    routers: dict[int, dict[str, list[tuple[str, Path]]]] = {}
    norms: dict[int, tuple[str, Path]] = {}
    dtypes: dict[str, str] = {}
    for name, file, dtype in _names(files):
        if (match := _ROUTER.search(name)) and int(match[1]) < num_hidden_layers:
            of_tensor = routers.setdefault(int(match[1]), {}).setdefault(match[2], [])
            of_tensor.append((name, file))
            dtypes[name] = dtype
        elif match := _NORM.search(name):
            norms[int(match[1])] = (name, file)
    _refuse_quantised(files[0].parent, routers, dtypes)
    for layer in sorted(routers):
        tensors = {t: _one_of(routers[layer][t]) for t in TENSORS if t in routers[layer]}
        norm = _finite(*norms[layer]) if layer in norms else None
        yield RouterTensors(layer, tensors, norm)


def _names(files: Sequence[Path]) -> list[tuple[str, Path, str]]:
    """Name, file and dtype (as safetensors names it) of every tensor of a router or of a layer's norm."""
    found: dict[str, tuple[str, Path, str]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as checkpoint:
                for name in checkpoint.keys():  # noqa: SIM118
                    if _ROUTER.search(name) or _NORM.search(name):
                        found[name] = name, file, checkpoint.get_slice(name).get_dtype()
        except (SafetensorError, OSError) as error:
            raise FingerprintError(f"{file}: not a readable safetensors file ({error})") from None
    return list(found.values())


def _refuse_quantised(
    folder: Path, routers: dict[int, dict[str, list[tuple[str, Path]]]], dtypes: dict[str, str]
) -> None:
    """A weight that is not there or not in floating point: another tensor (qweight, weight_packed) has it."""
    forms: dict[str, list[int]] = {}
    for layer, tensors in sorted(routers.items()):
        plain = [dtypes[name] in _FLOATS for name, _ in tensors.get("weight", [])]
        if not plain or not all(plain):
            other = sorted(tensors.keys() - set(TENSORS))
            stored = [f"weight in {dtypes[name]}" for name, _ in tensors.get("weight", [])]
            forms.setdefault(", ".join(stored + other), []).append(layer)
    if forms:
        which = "; ".join(f"decoder layers {layers}: {form}" for form, layers in forms.items())
        raise FingerprintError(
            f"{folder}: the routers are quantised ({which}), so they are not those that any scores file was "
            "made for; use a copy whose quantisation left out the routers"
        )


def _one_of(named: list[tuple[str, Path]]) -> torch.Tensor:
    """The values under these names, which must be the same if there are several."""
    (first, file), *others = named
    values = _finite(first, file)
    for name, elsewhere in others:
        if not torch.equal(_read(name, elsewhere).float(), values.float()):
            raise FingerprintError(
                f"{first} in {file} and {name} in {elsewhere} differ, and both name one router; remove one"
            )
    return values


def _finite(name: str, file: Path) -> torch.Tensor:
    """The values of a tensor; those that a cast to float16 pushed to infinity describe no router."""
    values = _read(name, file)
    if not values.isfinite().all():
        raise FingerprintError(
            f"{file}: {name} has values that are not finite, as a cast to float16 makes of large ones; "
            "download the model again, or use a copy in another dtype"
        )
    return values


def _read(name: str, file: Path) -> torch.Tensor:
    with safe_open(file, "pt") as checkpoint:
        values: torch.Tensor = checkpoint.get_tensor(name)
    return values
