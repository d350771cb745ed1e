"""Makes up a router file for a model without training it: a random step away from the model's own router.

For this project's tests, and for anyone who wants to try out code that reads router files.
"""

import json
from pathlib import Path
from typing import Any

import torch

from cor_vllm.checkpoint import router_layers, transformers_files
from cor_vllm.overlay import OverlayConfig, RouterOverlay
from cor_vllm.testing.make_scores import config_of, routers

_TRAINING: dict[str, Any] = {
    "objective": "epo", "learning_rate": 3e-4, "kl": 0.0, "beta": 0.1, "tau": 0.1, "routes": 32, "pool": 32,
    "temperature": 1.0, "epochs": 1, "batch": 16, "steps": 1, "debias": False, "seed": 0, "corpus": "none",
    "corpus_sha256": "0" * 64, "positions": 10, "documents": 2,
}  # fmt: skip
_BIN = {"positions": 10, "documents": 2, "base": 2.0, "change": -0.02, "low": -0.03, "high": -0.01,
        "median": -0.01, "win_rate": 0.6}  # fmt: skip


def base_weight(folder: Path, layer: int) -> torch.Tensor:
    """[N, H] the router weight of a decoder layer, as the checkpoint in `folder` stores it."""
    hidden_layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    found = {r.layer: r.tensors for r in router_layers(transformers_files(folder), hidden_layers)}
    return found[layer]["weight"]


def make(
    folder: Path,
    layer: int | None = None,
    dtype: str = "float32",
    drift: float = 0.5,
    seed: int = 0,
    **training: Any,
) -> RouterOverlay:
    """A valid RouterOverlay for the checkpoint in `folder`, whose held-out check shows a gain.

    Args:
        folder: a model folder with safetensors.
        layer: decoder layer; None: the last one that has experts.
        dtype: that the weight is rounded to.
        drift: how far the weight is from the model's own, relative to its Frobenius norm.
        seed: of the direction.
        training: replaces values of the section of that name.
    """
    layer = routers(folder).layers[-1] if layer is None else layer
    base = base_weight(folder, layer).float()
    step = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed))
    config = OverlayConfig.model_validate({
        "model": config_of(folder, [1])["model"],
        "dtype": dtype,
        "training": {**_TRAINING, **training},
        "heldout": {"all": _BIN},
        "diagnostics": {},
        "drift": drift,
        "versions": {"cor-vllm": "0.1.0"},
    })  # fmt: skip
    weight = (base + step * (drift * base.norm() / step.norm())).to(config.torch_dtype).float()
    return RouterOverlay(torch.tensor([layer], dtype=torch.int32), weight[None], config)
