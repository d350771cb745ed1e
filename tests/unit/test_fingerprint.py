"""What the fingerprint covers: all of a model's routers, nothing else, and the same bytes for ever."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cor_vllm.fingerprint import FingerprintError, Routers, read_routers
from cor_vllm.testing import tiny_models

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"
GATE = torch.arange(6.0).view(3, 2)


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sha256(*tensors: torch.Tensor) -> str:
    """Each tensor as its dtype and shape in words, then its bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def test_files_made_earlier_stay_valid() -> None:
    expected = "0acbedcffa99631d6fa86970c51a4353123a19d2a49f8858e4b9d07603296c0e"
    assert read_routers(DEMO) == Routers((0, 1, 2, 3, 4, 5), expected)


@pytest.mark.parametrize(
    "names",
    [
        ("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),  # DeepSeek-V3, GLM-4-MoE
        ("mlp.router.weight", "mlp.router.bias"),  # GPT-OSS
        ("block_sparse_moe.gate.weight", "block_sparse_moe.gate.bias"),
    ],
)
def test_every_tensor_of_a_router_counts_in_layer_order(tmp_path: Path, names: tuple[str, str]) -> None:
    tensors, order = {"model.layers.1.mlp.gate_proj.weight": torch.ones(1)}, []
    for layer in (2, 10):
        for offset, name in enumerate(names):
            values = GATE[:, 0].clone() if offset else GATE.clone()
            order.append(values + layer)
            tensors[f"model.layers.{layer}.{name}"] = order[-1]
    found = read_routers(checkpoint(tmp_path, tensors, num_hidden_layers=11))
    assert found == Routers((2, 10), sha256(*order))


@pytest.mark.parametrize("nested", [False, True])
def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path, nested: bool) -> None:
    tensors = {f"model.layers.{layer}.mlp.gate.weight": GATE + layer for layer in (1, 2, 3)}
    config: dict[str, Any] = {"num_hidden_layers": 3}
    found = read_routers(checkpoint(tmp_path, tensors, **({"text_config": config} if nested else config)))
    assert found == Routers((1, 2), sha256(GATE + 1, GATE + 2))


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_correction_biases_are_saved_by_their_published_names_and_count(family: str, tmp_path: Path) -> None:
    folder = tiny_models.build(family, tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    biases = [name for name in tensors if "e_score_correction_bias" in name]
    assert biases == [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)]
    before = read_routers(folder)
    assert before.layers == (1, 2)
    tensors[biases[0]][3] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert read_routers(folder).fingerprint != before.fingerprint


def test_folders_without_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(
        FingerprintError, match=r"config\.json: says no num_hidden_layers \(FileNotFoundError"
    ):
        read_routers(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FingerprintError, match=r"config\.json: says no num_hidden_layers \(KeyError"):
        read_routers(tmp_path)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(FingerprintError, match=r"no \*\.safetensors file"):
        read_routers(tmp_path)
    with pytest.raises(FingerprintError, match="no router weights found"):
        read_routers(checkpoint(tmp_path, {"lm_head.weight": GATE}, num_hidden_layers=2))
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(FingerprintError, match="not a readable safetensors file"):
        read_routers(tmp_path)
