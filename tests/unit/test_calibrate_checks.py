"""Models whose routers were not loaded, and numbers that are not finite, are named with their layers."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cor_vllm.calibrate.config import CalibrationError, CalibrationOptions
from cor_vllm.calibrate.interventions.checks import check_baseline, check_measured, ignores_the_token, named
from cor_vllm.calibrate.interventions.measurement import LayerMeasurement, baseline
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.pipeline import calibrate
from cor_vllm.testing import tiny_models

SEQUENCES = [[5, 6, 7, 8, 5, 9], [300, 5, 31]]


def router_of(model: MoeModel, number: int) -> torch.nn.Parameter:
    weight = model._router_modules[number].weight
    assert isinstance(weight, torch.nn.Parameter)
    return weight


def zeros(weight: torch.Tensor) -> None:
    weight.zero_()


def copies_of_one_row(weight: torch.Tensor) -> None:
    weight[:] = weight[0].clone()


@pytest.mark.parametrize("damage", [zeros, copies_of_one_row])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "number", "layer"),
    [("qwen3_moe", 0, 0), ("qwen2_moe", 1, 2), ("deepseek_v3", 1, 2), ("gpt_oss", 2, 2)],
)
def test_a_router_that_was_not_loaded_is_named(
    family: str, number: int, layer: int, dtype: torch.dtype, damage: Callable[[torch.Tensor], None]
) -> None:
    """GPT-OSS's has a bias, DeepSeek-V3's a correction bias: the logits or the choice are not zeros."""
    model = MoeModel(tiny_models.create(family).to(dtype))
    check_baseline(model, baseline(model, SEQUENCES), SEQUENCES)
    with torch.no_grad():
        damage(router_of(model, number))
    if damage is copies_of_one_row and family == "gpt_oss":
        with torch.no_grad():
            model._router_modules[number].bias.zero_()  # which would be added after rounding
    with pytest.raises(
        CalibrationError, match=rf"the routers of decoder layer {layer} choose the same experts"
    ):
        check_baseline(model, baseline(model, SEQUENCES), SEQUENCES)


@pytest.mark.parametrize("factor", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_router_that_is_nearly_flat_passes(family: str, factor: float) -> None:
    model = MoeModel(tiny_models.create(family))
    with torch.no_grad():
        router_of(model, 0).mul_(factor)
    check_baseline(model, baseline(model, SEQUENCES), SEQUENCES)


def test_one_token_over_and_over_tells_nothing() -> None:
    model = MoeModel(tiny_models.create("qwen3_moe"))
    repeated = [[5, 5, 5, 5, 9]]
    base = baseline(model, repeated)
    assert ignores_the_token(base.router_logits[0])
    check_baseline(model, base, repeated)


def edited(folder: Path, family: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    from safetensors.torch import load_file, save_file

    tiny_models.build(family, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def run(model: Path, output: Path, **values: Any) -> None:
    chosen: dict[str, Any] = {"num_tokens": 60, "seq_len": 24, "heldout_tokens": 40} | values
    calibrate(CalibrationOptions(model=str(model), output=output, **chosen), Console(file=io.StringIO()))


def test_the_command_refuses_routers_of_zeros(tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("mlp.gate.weight"):
                tensors[name].zero_()

    with pytest.raises(CalibrationError, match="the routers of decoder layers 1, 2 choose the same experts"):
        run(edited(tmp_path / "m", "deepseek_v2", edit), tmp_path / "s")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_router_logits_that_are_not_finite(tmp_path: Path, value: float) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.self_attn.o_proj.weight"][0, 0] = value  # a router's own are named before

    expected = (
        r"router logits are not finite in decoder layer 2, computed in torch\.float32; check the checkpoint"
    )
    with pytest.raises(CalibrationError, match=expected):
        run(edited(tmp_path / "m", "olmoe", edit), tmp_path / "s")


def test_an_overflow_in_float16(tmp_path: Path) -> None:
    """The residual stream leaves layer 0 beyond 65,504: fine in float32, infinite in float16."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.startswith("model.layers.0.mlp.experts") and name.endswith("down_proj.weight"):
                tensors[name] *= 1e5

    model = edited(tmp_path / "m", "olmoe", edit)
    expected = r"not finite in decoder layers 1, 2, computed in torch\.float16; try --dtype float32"
    with pytest.raises(CalibrationError, match=expected):
        run(model, tmp_path / "s", dtype="float16")
    run(model, tmp_path / "s")


def test_held_out_losses_that_are_not_finite(tmp_path: Path) -> None:
    """A token that only the held-out text has."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][1:256] = float("nan")  # bytes; id 0 pads

    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps([list(range(260, 300)), list(range(300, 280, -1))]))
    with pytest.raises(CalibrationError, match=r"40 of 40 held-out losses are not finite in torch\.float32"):
        run(edited(tmp_path / "m", "olmoe", edit), tmp_path / "s", token_ids=ids, corpus="default")


def test_interventions_that_overflow_are_named() -> None:
    model = MoeModel(tiny_models.create("deepseek_v2"))  # MoE layers in decoder layers 1 and 2
    ids = torch.zeros(2, 2, dtype=torch.int64)

    def measured(value: float) -> LayerMeasurement:
        changes = torch.tensor([0.0, value], dtype=torch.float64)
        return LayerMeasurement(torch.zeros(2), torch.zeros(2), ids, torch.zeros(2, 2), more=changes)

    check_measured(model, [measured(0.1), measured(0.2)])
    with pytest.raises(CalibrationError, match=r"interventions on decoder layer 2 gave losses that are not"):
        check_measured(model, [measured(0.1), measured(float("inf"))])


def test_long_lists_of_layers_are_cut() -> None:
    assert named([3]) == "decoder layer 3"
    assert named(range(48)) == "decoder layers 0, 1, 2, 3, 4, 5, 6, 7, … (48 in all)"
