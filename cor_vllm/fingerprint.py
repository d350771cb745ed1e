"""What ties a scores file to a model: its routers, which quantised or re-sharded copies keep."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from cor_vllm.checkpoint import INDEX, SINGLE, indexed_files, router_layers, transformers_files
from cor_vllm.checkpoint import FingerprintError as FingerprintError  # for those who read routers
from cor_vllm.copies import describe
from cor_vllm.metadata import RouterInfo


@dataclasses.dataclass(frozen=True)
class Routers:
    """The routers of a checkpoint: the decoder layers that have one, and what they are known by."""

    layers: tuple[int, ...]
    fingerprint: str  # SHA-256 over the bytes as stored, 64 hexadecimal digits
    info: tuple[RouterInfo, ...] = dataclasses.field(default=(), compare=False)  # by layer


def read_routers(folder: Path) -> Routers:
    """The routers that transformers loads from a folder, which are those that a calibration measures.

    Args:
        folder: a local model folder with config.json and `model.safetensors`, or the files of an index.

    Raises:
        FingerprintError: no readable config.json, index or safetensors file, no router in any of them, or
            quantised ones; or `model.safetensors`, which transformers loads, has other routers than the files
            of the index, which vLLM loads.
    """
    num_hidden_layers = _num_hidden_layers(folder / "config.json")
    files = transformers_files(folder)
    found = routers_of(files, num_hidden_layers)
    if (folder / INDEX).is_file() and files == [folder / SINGLE]:
        indexed = indexed_files(folder)
        if indexed != files and routers_of(indexed, num_hidden_layers) != found:
            raise FingerprintError(
                f"{folder}: {SINGLE}, which transformers loads, has other routers than the files of {INDEX}, "
                "which vLLM loads; remove what does not belong to the model"
            )
    return found


def routers_of(files: Sequence[Path], num_hidden_layers: int) -> Routers:
    """Hash the routers of all MoE layers in these files, in layer order, with their biases.

    Args:
        files: one or more safetensors files of one folder, in the order in which they are loaded; of a tensor
            in two the last one counts.
        num_hidden_layers: decoder layers of the model; further ones, which predict further tokens, do not
            count.

    Raises:
        FingerprintError: a file is not readable, has no router, or has a quantised one.

    Source: `docs/reference/scores-file.md`, "What ties a file to a model".
    """
    total, info = hashlib.sha256(), []
    for router in router_layers(files, num_hidden_layers):
        for tensor in router.tensors.values():
            total.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
            total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        info.append(describe(router))
    if not info:
        raise FingerprintError(
            f"{files[0].parent}: no router weights found; is this a mixture-of-experts model?"
        )
    return Routers(tuple(router.layer for router in info), total.hexdigest(), tuple(info))


def _num_hidden_layers(file: Path) -> int:
    try:
        config = json.loads(file.read_bytes())
        found: int = (config.get("text_config") or config)["num_hidden_layers"]
        if type(found) is not int:
            raise TypeError(f"it is {found!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FingerprintError(
            f"{file}: says no num_hidden_layers ({type(error).__name__}: {error}); download the model again"
        ) from None
    return found
