"""Router files that cannot be right are refused by name; what a start with one says and is keyed by."""

import inspect
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from cor_vllm import overlay as overlay_file
from cor_vllm.overlay import OverlayError
from cor_vllm.serve.fit import MisfitError
from cor_vllm.serve.gate import GateError
from cor_vllm.serve.overlaid import find
from cor_vllm.serve.start import create_engine_config
from cor_vllm.testing.make_overlay import make
from tests import model_copies
from tests.parity.engine import start
from tests.parity.test_overlay import written
from tests.parity.test_refusals import configured

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def qwen(checkpoints) -> Path:
    return checkpoints["qwen3_moe"]


def test_files_of_other_models_are_refused_before_the_weights(qwen, tmp_path):
    overlay = make(qwen)
    cor = written(qwen, overlay)
    configured(qwen, cor)
    trained = model_copies.copy(qwen, tmp_path / "trained", model_copies.other_routers)
    with pytest.raises(MisfitError, match=r"fingerprint: the router file has .* `cor-vllm reroute`"):
        configured(trained, cor)
    folded = model_copies.copy(qwen, tmp_path / "folded", model_copies.folded(2))
    with pytest.raises(MisfitError, match="decoder layer 2 was rescaled together with the norm"):
        configured(folded, cor)
    configured(model_copies.copy(qwen, tmp_path / "elsewhere", model_copies.folded(1)), cor)
    configured(qwen, written(qwen, make(qwen, dtype="bfloat16"), "bfloat16"))  # float32 has all its values
    with pytest.raises(MisfitError, match=r"in bfloat16 by this engine.* serve with --dtype float16, or"):
        configured(qwen, written(qwen, make(qwen, dtype="float16"), "float16"), dtype="bfloat16")
    with pytest.raises(OverlayError, match="No such file"):
        configured(qwen, {"router": str(tmp_path / "absent")})


def test_the_start_says_what_speaks_against_the_file(qwen, caplog, monkeypatch):
    configured(qwen, written(qwen, make(qwen)))  # which sets up vLLM's own log, too
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    configured(qwen, written(qwen, make(qwen)))
    assert "CoR" not in caplog.text
    configured(qwen, written(qwen, make(qwen, objective="none")))
    assert "this router is the model's own" in caplog.text
    configured(qwen, written(qwen, make(qwen)), load_format="dummy")
    assert "dummy weights, so the router file's fingerprint is not compared" in caplog.text


def test_switched_off_by_the_environment(qwen, monkeypatch):
    monkeypatch.setenv("COR_DISABLE", "1")
    monkeypatch.setattr(EngineArgs, "create_engine_config", create_engine_config(stock_configuration()))
    assert "cor" not in configured(qwen, written(qwen, make(qwen))).additional_config


def stock_configuration() -> Any:
    """vLLM's own EngineArgs.create_engine_config, below the plugin's."""
    return inspect.unwrap(EngineArgs.create_engine_config)


def test_compiled_graphs_are_kept_apart(qwen):
    """By the file's content, not its path alone, and by whether there is one."""
    cor = written(qwen, make(qwen))
    first = configured(qwen, cor).compute_hash()
    assert configured(qwen, cor).compute_hash() == first
    overlay_file.save(cor["router"], make(qwen, seed=1))
    assert configured(qwen, cor).compute_hash() != first


def test_a_router_kept_in_a_dtype_without_its_values_is_refused_after_the_load(qwen):
    """Models may keep their routers in float32, so that a file for float32 can be right in bfloat16."""
    with pytest.raises(GateError, match=r"kept in bfloat16 by this engine.*reroute --served-dtype bfloat16"):
        start(qwen, written(qwen, make(qwen)), dtype="bfloat16")


def gate_like(**changes: Any) -> Any:
    """A router of a model of cardboard that can be replaced but for `changes`."""
    from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod

    gate = ReplicatedLinear.__new__(ReplicatedLinear)
    torch.nn.Module.__init__(gate)
    gate.quant_method = UnquantizedLinearMethod.__new__(UnquantizedLinearMethod)
    gate.params_dtype, gate.output_size, gate.input_size = torch.float32, 7, 64
    for name, value in changes.items():
        setattr(gate, name, value)
    return gate


def model_like(gate: Any, layer: int = 2, **runner_has: Any) -> torch.nn.Module:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    runner = MoERunner.__new__(MoERunner)
    torch.nn.Module.__init__(runner)
    for name, value in runner_has.items():
        setattr(runner, name, value)
    block = torch.nn.Module()
    block.experts, block.gate = runner, gate
    layers = torch.nn.ModuleDict({str(layer): torch.nn.ModuleDict({"mlp": block})})
    return torch.nn.ModuleDict({"layers": layers})


def test_routers_that_cannot_be_replaced_are_refused_by_name(qwen):
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    overlay, config = make(qwen), SimpleNamespace(router="F")
    assert find(model_like(gate_like()), overlay, config) is not None
    sharded = gate_like()
    sharded.__class__ = ColumnParallelLinear
    cases = [
        (model_like(gate_like(), layer=1), "has none there that can be replaced"),
        (model_like(None), "has none there that can be replaced"),
        (model_like(gate_like(base_layer=torch.nn.Identity())), "LoRA adapters .* leave out --enable-lora"),
        (model_like(sharded), "is a ColumnParallelLinear, of which a rank may hold a part"),
        (model_like(gate_like(quant_method=object())), "is quantised here"),
        (model_like(gate_like(), _fse_fuse_gate=True), "in a second form"),
        (model_like(gate_like(_rocm_bf16x3_weight_eligible=True)), "in a second form"),
        (model_like(gate_like(output_size=8)), r"has shape \[8, 64\] here and \[7, 64\] in the file"),
        (model_like(gate_like(params_dtype=torch.float16)), "kept in float16 .* --dtype float32"),
    ]
    for model, says in cases:
        with pytest.raises(GateError, match=f"^F: the router of decoder layer 2:? .*{says}") as caught:
            find(model, overlay, config)
        assert "\n" not in str(caught.value)
