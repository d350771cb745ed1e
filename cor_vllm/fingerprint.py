"""What ties a scores file to a model: a hash of the routers, which quantised or re-sharded copies keep."""

import dataclasses
import hashlib
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

# Router tensors by their names in the published checkpoints: Qwen, OLMoE and DeepSeek (mlp.gate), Mixtral
# (block_sparse_moe.gate), GPT-OSS (mlp.router). A dense layer's mlp.gate_proj does not match.
_ROUTER = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe)\.(?:gate|router)\.(weight|bias)$")


class FingerprintError(ValueError):
    """A checkpoint without routers to hash: one line with the cause and the remedy."""


@dataclasses.dataclass(frozen=True)
class Routers:
    """The routers of a checkpoint: the decoder layers that have one, and the hash over all of them."""

    layers: tuple[int, ...]
    fingerprint: str  # SHA-256, 64 hexadecimal digits


def read_routers(folder: Path) -> Routers:
    """Find and hash the router weights of all MoE layers, as stored in the checkpoint, in layer order.

    Args:
        folder: a local model folder with one or more `*.safetensors` files.

    Raises:
        FingerprintError: no readable safetensors file, or no router tensor in any of them.

    Source: contract.md, "fingerprint".
    """
    routers: dict[tuple[int, bool], tuple[Path, str]] = {}
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
            if match := _ROUTER.search(name):
                routers[int(match[1]), match[2] == "bias"] = (file, name)
    if not routers:
        raise FingerprintError(f"{folder}: no router weights found; is this a mixture-of-experts model?")
    layers = tuple(sorted({layer for layer, _ in routers}))
    return Routers(layers, _hash([routers[key] for key in sorted(routers)]))


def _hash(routers: list[tuple[Path, str]]) -> str:
    total = hashlib.sha256()
    for file, name in routers:
        with safe_open(file, "pt") as checkpoint:
            tensor = checkpoint.get_tensor(name)
        total.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
