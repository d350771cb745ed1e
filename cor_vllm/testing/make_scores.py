"""Makes up scores for a model without calibrating it: any k in each layer, random CEI.

For this project's tests and benchmarks, and for anyone who wants to try out code that reads scores files.
"""

import json
from pathlib import Path
from typing import Any

import torch

from cor_vllm.fingerprint import Routers, read_routers
from cor_vllm.metadata import ScoresConfig
from cor_vllm.scores import Scores


def routers(folder: Path) -> Routers:
    """The routers of a checkpoint; without weights, one for every layer that config.json gives experts."""
    if any(folder.glob("*.safetensors")):
        return read_routers(folder)
    hf = json.loads((folder / "config.json").read_text())
    layers = range(hf.get("first_k_dense_replace", 0), hf["num_hidden_layers"])
    return Routers(tuple(layers), "0" * 64)


def config_of(folder: Path, k: list[int], **model: Any) -> dict[str, Any]:
    """The JSON part of a scores file for a checkpoint with budget `k`; `model` replaces fields in it."""
    hf = json.loads((folder / "config.json").read_text())
    experts = next(hf[n] for n in ("num_experts", "num_local_experts", "n_routed_experts") if n in hf)
    return {
        "model": {
            "name": folder.name,
            "revision": None,
            "architecture": hf["architectures"][0],
            "num_experts": experts,
            "top_k": hf["num_experts_per_tok"],
            "num_hidden_layers": hf["num_hidden_layers"],
            "fingerprint": routers(folder).fingerprint,
            "routers": [info.model_dump() for info in routers(folder).info] or None,
            **model,
        },
        "calibration": {
            "corpus": "none", "corpus_sha256": "0" * 64, "seed": 0, "num_positions": 10,
            "num_hard": 1, "num_easy": 1, "tau_high": 2.0, "tau_low": 0.5,
        },
        "budget": {"rule": "exact", "k_min": 1, "k_max": experts, "total": sum(k), "sum": sum(k)},
        "versions": {"cor-vllm": "0.1.0"},
    }  # fmt: skip


def make(folder: Path, k: list[int] | None = None, cei: torch.Tensor | None = None, seed: int = 0) -> Scores:
    """A valid Scores for the checkpoint in `folder`.

    Args:
        folder: a model folder, with safetensors or only a configuration.
        k: k_l of each MoE layer; if None, the model's own top_k in all of them.
        cei: [M, N] in [0, 1]; if None, random.
        seed: makes the random tensors repeatable.
    """
    layers = routers(folder).layers
    hf = json.loads((folder / "config.json").read_text())
    k = k or [hf["num_experts_per_tok"]] * len(layers)
    config = ScoresConfig.model_validate(config_of(folder, k))
    m, n = len(layers), config.model.num_experts
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(m, n, generator=generator)
    return Scores(
        layer_index=torch.tensor(layers, dtype=torch.int32),
        k=torch.tensor(k, dtype=torch.int32),
        cei=values if cei is None else cei,
        cei_raw=torch.randn(m, n, generator=generator),
        cei_sem=torch.rand(m, n, generator=generator),
        cei_count=torch.randint(0, 20, (m, n), generator=generator, dtype=torch.int32),
        rki=torch.randn(m, generator=generator),
        sensitivity_hard=torch.randn(m, generator=generator),
        sensitivity_easy=torch.randn(m, generator=generator),
        router_prob=torch.rand(m, n, generator=generator).softmax(-1),
        swap_rate=torch.rand(m, 5, generator=generator).sort(-1).values,
        config=config,
    )
