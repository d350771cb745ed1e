"""What vLLM's CPU build has to be told for latent attention: the backend, and the rotary embeddings.

A machine without AMX is told that it has AMX, by the question that vLLM asks; its selection is vLLM's own.
"""

import gc
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cor_vllm.evaluate.harness import engine_model
from cor_vllm.serve import cpu
from cor_vllm.serve.fit import MisfitError
from cor_vllm.testing import tiny_models
from cor_vllm.testing.make_scores import make
from cor_vllm.verify import command as verify
from tests.parity.engine import answer, start
from tests.parity.test_parity import varied, written
from tests.parity.test_refusals import caplog_vllm, configured

__all__ = ["caplog_vllm"]  # a fixture
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
OFF = {"custom_ops": ["-rotary_embedding"]}


@pytest.fixture
def amx(monkeypatch) -> None:
    from vllm.platforms import CpuArchEnum, current_platform

    monkeypatch.setattr(type(current_platform), "get_cpu_architecture", lambda *_: CpuArchEnum.X86)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)


def cor(folder: Path) -> dict[str, object]:
    return written(folder, make(folder, k=varied(folder)))


def arguments(folder: Path, **given: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(str(folder), **given)


def backends(llm: Any) -> set[str]:
    """The classes that compute the attention."""
    modules = llm.apply_model(
        lambda model: [type(getattr(m, "impl", None)).__name__ for m in model.modules()]
    )
    return {name for name in modules[0] if name.endswith("Impl")}


@pytest.mark.parametrize(
    ("family", "given", "backend"),
    [
        ("deepseek_v2", {"dtype": "float32"}, "CPU_MLA"),
        ("deepseek_v3", {"dtype": "float16"}, "CPU_MLA"),
        ("deepseek_v3", {"dtype": "bfloat16"}, None),
        ("deepseek_v2", {"dtype": "float32", "attention_backend": "AMX_MLA"}, "AMX_MLA"),  # the user's
        ("qwen3_moe", {"dtype": "float32"}, None),
    ],
)
def test_the_backend_that_our_commands_choose_on_amx(checkpoints, amx, family, given, backend):
    engine = arguments(checkpoints[family], **given)
    lines = cpu.mend(engine)
    assert getattr(engine.attention_backend, "name", engine.attention_backend) == backend
    chosen = backend is not None and "attention_backend" not in given
    assert any("--attention-backend CPU_MLA" in line for line in lines) == chosen
    if chosen:
        assert engine.create_engine_config().cache_config.block_size == 16  # what vLLM sets for that backend


def test_without_amx_vllm_chooses(checkpoints, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    engine = arguments(checkpoints["deepseek_v2"], dtype="float32")
    cpu.mend(engine)
    assert engine.attention_backend is None


@pytest.mark.parametrize(
    ("given", "operations"),
    [
        ({}, ["-rotary_embedding"]),
        (
            {"compilation_config": {"custom_ops": ["all", "+rms_norm"]}},
            ["all", "+rms_norm", "-rotary_embedding"],
        ),
        ({"compilation_config": OFF}, ["-rotary_embedding"]),
        ({"compilation_config": {"custom_ops": ["+rotary_embedding"]}}, ["+rotary_embedding"]),  # the user's
    ],
)
def test_the_rotary_kernel_is_switched_off_beside_what_the_user_chose(checkpoints, given, operations):
    for family in ("deepseek_v2", "deepseek_v3"):
        engine = arguments(checkpoints[family], **given)
        cpu.mend(engine)
        assert engine.compilation_config.custom_ops == operations
    other = arguments(checkpoints["glm4_moe"])
    assert cpu.mend(other) == [] and other.compilation_config.custom_ops == []


def test_on_a_gpu_nothing_is_chosen_or_said(checkpoints, monkeypatch, amx):
    from vllm.platforms import current_platform

    eager = arguments(checkpoints["deepseek_v2"], dtype="float32", enforce_eager=True)
    config = eager.create_engine_config()
    assert cpu.warnings(config) and cpu.refusal(config)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    engine = arguments(checkpoints["deepseek_v2"], dtype="float32")
    assert (cpu.mend(engine), engine.attention_backend) == ([], None)
    assert cpu.warnings(config) == [] and cpu.refusal(config) is None


def test_a_server_on_amx_is_refused_with_the_remedy_before_weights_load(checkpoints, amx):
    folder = checkpoints["deepseek_v2"]
    remedy = r"computes in bfloat16 only, and the dtype is float32: add --attention-backend CPU_MLA"
    with pytest.raises(MisfitError, match=remedy):
        configured(folder, cor(folder), attention_backend=None)
    configured(folder, cor(folder))
    configured(folder, cor(folder), attention_backend=None, dtype="bfloat16")


def test_a_server_says_that_its_rotary_kernel_is_wrong(checkpoints, tmp_path, caplog_vllm):
    says = "CPU kernel for rotary embeddings is wrong for this model's latent attention"
    folder = checkpoints["deepseek_v3"]
    configured(folder, cor(folder))
    assert caplog_vllm.text.count(says) == 1
    assert """add --compilation-config '{"custom_ops": ["-rotary_embedding"]}'""" in caplog_vllm.text
    configured(folder, cor(folder), compilation_config=OFF)
    configured(checkpoints["qwen3_moe"], cor(checkpoints["qwen3_moe"]))
    scaled = tiny_models.build("deepseek_v3", tmp_path / "scaled", rope_parameters=YARN)
    configured(scaled, cor(scaled))
    assert caplog_vllm.text.count(says) == 1


@pytest.mark.slow
def test_verify_on_amx(checkpoints, amx):
    """As a user runs it, without a word on backends: it starts, on the right ones, and says so."""
    folder = checkpoints["deepseek_v3"]
    llm, notes = verify._load(str(folder), {"cor_scores": str(cor(folder)["scores"])}, ["--dtype", "float32"])
    report = verify.inspect(llm)
    used = backends(llm)
    (rotary,) = llm.apply_model(lambda model: model.model.layers[0].self_attn.rotary_emb._forward_method)
    del llm
    gc.collect()
    assert (report["problems"], report["notes"]) == ([], [])
    assert used == {"CPUMLAImpl"} and rotary.__name__ == "forward_native"
    text = verify.render({**report, "notes": notes})
    assert "NOTE: vLLM takes its AMX backend for latent attention" in text
    assert "NOTE: vLLM's CPU kernel for rotary embeddings is wrong" in text


@pytest.mark.slow
def test_the_engines_of_these_tests_start_on_amx(checkpoints, amx):
    llm = start(checkpoints["deepseek_v2"])
    used = backends(llm)
    del llm
    gc.collect()
    assert used == {"CPUMLAImpl"}


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX")
def test_the_backend_of_amx(checkpoints):
    """The other backend, which these tests use nowhere else, in the one dtype that it takes."""
    folder = checkpoints["deepseek_v2"]
    llm = start(folder, cor(folder), dtype="bfloat16", attention_backend="AMX_MLA")
    used, report, answers = backends(llm), verify.inspect(llm), answer(llm, 4)
    del llm
    gc.collect()
    assert used == {"AMXMLAImpl"}
    assert report["problems"] == []
    assert all(map(math.isfinite, (value for one in answers for value in one.logprobs)))


def test_an_engine_of_the_evaluation_gets_the_same(checkpoints, monkeypatch, amx, capsys):
    """The harness's class is played: it hands its arguments to vllm.LLM."""
    got = {}

    class VLLM:
        max_length = 256

        def __init__(self, pretrained: str, **arguments: Any) -> None:
            got.update(arguments)

    module = type(sys)("lm_eval.models.vllm_causallms")
    module.VLLM = VLLM
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", module)
    given = {"dtype": "float32", "seed": 1, "batch_size": 4, "compilation_config": {"custom_ops": ["all"]}}
    engine_model(str(checkpoints["deepseek_v2"]), None, given)
    assert got.pop("attention_backend") == "CPU_MLA"
    assert got.pop("compilation_config").custom_ops == ["all", "-rotary_embedding"]
    assert got == {"dtype": "float32", "seed": 1, "batch_size": 4}
    assert len(capsys.readouterr().err.splitlines()) == 2
    engine_model(str(checkpoints["qwen3_moe"]), None, given)
    assert got["compilation_config"] == given["compilation_config"]
