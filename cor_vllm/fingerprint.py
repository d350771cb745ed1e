"""What ties a scores file to a model: a hash of the routers, which quantised or re-sharded copies keep."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cor_vllm.errors import CorError

# Router tensors by their names in the published checkpoints: Qwen, OLMoE, DeepSeek, GLM (mlp.gate), Mixtral
# (block_sparse_moe.gate), GPT-OSS (mlp.router). A dense layer's mlp.gate_proj does not match.
_TENSORS = ("weight", "bias", "e_score_correction_bias")  # in the order in which a layer's are hashed
_ROUTER = re.compile(
    rf"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe)\.(?:gate|router)\.({'|'.join(_TENSORS)})$"
)


class FingerprintError(CorError):
    """A checkpoint without routers to hash: one line with the cause and the remedy."""


@dataclasses.dataclass(frozen=True)
class Routers:
    """The routers of a checkpoint: the decoder layers that have one, and the hash over all of them."""

    layers: tuple[int, ...]
    fingerprint: str  # SHA-256, 64 hexadecimal digits


def read_routers(folder: Path) -> Routers:
    """Find and hash the router weights of all MoE layers, as stored in the checkpoint, in layer order.

    Correction biases, which decide the choice of experts too, are hashed with them. Layers beyond the model's
    own, which predict further tokens (DeepSeek-V3, GLM-4-MoE), are left out.

    Args:
        folder: a local model folder with config.json and one or more `*.safetensors` files.

    Raises:
        FingerprintError: no readable config.json or safetensors file, or no router tensor in any of them.

    Source: contract.md, "fingerprint".
    """
    routers: dict[tuple[int, int], tuple[Path, str]] = {}
    num_hidden_layers = _num_hidden_layers(folder / "config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FingerprintError(
            f"{folder}: no *.safetensors file; a scores file can only be matched to a safetensors checkpoint"
        )
    for file in files:
        try:
            with safe_open(file, "pt") as checkpoint:
                names = list(checkpoint.keys())
        except (SafetensorError, OSError) as error:
            raise FingerprintError(f"{file}: not a readable safetensors file ({error})") from None
        for name in names:
            match = _ROUTER.search(name)
            if match and int(match[1]) < num_hidden_layers:
                routers[int(match[1]), _TENSORS.index(match[2])] = (file, name)
    if not routers:
        raise FingerprintError(f"{folder}: no router weights found; is this a mixture-of-experts model?")
    layers = tuple(sorted({layer for layer, _ in routers}))
    return Routers(layers, _hash([routers[key] for key in sorted(routers)]))


def _num_hidden_layers(file: Path) -> int:
    try:
        config = json.loads(file.read_text())
        found: int = (config.get("text_config") or config)["num_hidden_layers"]
    except (OSError, ValueError, KeyError) as error:
        raise FingerprintError(
            f"{file}: says no num_hidden_layers ({type(error).__name__}: {error}); download the model again"
        ) from None
    return found


def _hash(routers: list[tuple[Path, str]]) -> str:
    total = hashlib.sha256()
    for file, name in routers:
        with safe_open(file, "pt") as checkpoint:
            tensor = checkpoint.get_tensor(name)
        total.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
