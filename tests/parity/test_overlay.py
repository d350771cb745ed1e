"""A router file in an engine: against transformers, off again, while serving, after new weights, refused."""

import dataclasses
import functools
import gc
import inspect
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs

from cor_vllm import overlay as overlay_file
from cor_vllm import scores
from cor_vllm.overlay import OverlayError, RouterOverlay
from cor_vllm.serve.fit import MisfitError
from cor_vllm.serve.gate import GateError
from cor_vllm.serve.overlaid import find
from cor_vllm.serve.start import create_engine_config
from cor_vllm.testing import tiny_models
from cor_vllm.testing.make_overlay import base_weight, make
from cor_vllm.testing.make_scores import make as make_scores
from cor_vllm.verify import command as verify
from tests import cores, model_copies
from tests.parity.engine import PROMPTS, Completion, answer, generate, reference_completions, start
from tests.parity.test_control import GREEDY, ask, cached_blocks, core_of
from tests.parity.test_parity import assert_same
from tests.parity.test_refusals import configured
from tests.parity.test_weights_after_load import Transfer

pytestmark = pytest.mark.slow
TOKENS = 8
CACHING = {"enable_prefix_caching": True, "block_size": 32}  # the prompts fill some blocks


@pytest.fixture(scope="module")
def qwen(checkpoints) -> Path:
    return checkpoints["qwen3_moe"]


def written(folder: Path, overlay: RouterOverlay, name: str = "router") -> dict[str, Any]:
    path = folder.parent / f"{folder.name}.{name}.safetensors"
    overlay_file.save(path, overlay)
    return {"router": str(path), "admin": True}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    """Six experts, which two ranks can share, and no weights that two ranks cannot."""
    folder = tmp_path_factory.mktemp("models") / "mixtral"
    return tiny_models.build("mixtral", folder, num_hidden_layers=2)


@functools.cache
def stock(folder: Path, dtype: str = "float32") -> list[Completion]:
    return generate(folder, None, TOKENS, dtype=dtype)


@functools.cache
def alone(folder: Path) -> list[Completion]:
    return generate(folder, written(folder, make(folder)), TOKENS)


def stopped(llm: LLM) -> None:
    del llm
    gc.collect()


def with_router(folder: Path, overlay: RouterOverlay, to: Path) -> Path:
    """A copy of the checkpoint with the router of the file in the place of its own."""

    def replace(weights: model_copies.Weights) -> None:
        (name,) = (n for n in model_copies.routers(weights) if f".{overlay.layer}." in n)
        weights[name] = overlay.weight

    return model_copies.copy(folder, to, replace)


def switch(llm: LLM, on: bool) -> None:
    assert core_of(llm).cor_change(None, None, on) == ""


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_on_it_is_transformers_with_the_router_replaced_and_off_it_is_stock(checkpoints, tmp_path, family):
    folder = checkpoints[family]
    plain = stock(folder)
    overlay = make(folder)
    llm = start(folder, written(folder, overlay))
    on = answer(llm, TOKENS)
    values = make_scores(folder)
    own_k = dict.fromkeys(values.layer_index.tolist(), (values.config.model.top_k, None))
    assert_same(on, reference_completions(with_router(folder, overlay, tmp_path / "replaced"), own_k, on))
    assert on != plain
    assert verify.inspect(llm)["problems"] == []
    switch(llm, False)
    assert answer(llm, TOKENS) == plain
    switch(llm, True)
    assert answer(llm, TOKENS) == on
    stopped(llm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_router_that_is_the_models_own_changes_no_bit(qwen, dtype):
    """In float32 vLLM packs it for oneDNN, in bfloat16 for another kernel on CPUs that have one."""
    own = base_weight(qwen, 2).to(getattr(torch, dtype)).float()
    overlay = dataclasses.replace(make(qwen, dtype=dtype), router_weight=own[None])
    assert generate(qwen, written(qwen, overlay), TOKENS, dtype=dtype) == stock(qwen, dtype)


def test_in_bfloat16_it_is_switched_too(qwen):
    llm = start(qwen, written(qwen, make(qwen, dtype="bfloat16")), dtype="bfloat16")
    on = answer(llm, TOKENS)
    assert verify.inspect(llm)["problems"] == []
    switch(llm, False)
    assert answer(llm, TOKENS) == stock(qwen, "bfloat16") != on
    stopped(llm)


def test_a_compiled_model_is_switched(qwen):
    """On the CPU the router is part of the compiled graph: what it reads must not have become a constant."""
    compiled = {"enforce_eager": False, "compilation_config": {}}
    llm = start(qwen, written(qwen, make(qwen)), **compiled)
    on = answer(llm, TOKENS)
    switch(llm, False)
    off = answer(llm, TOKENS)
    switch(llm, True)
    assert answer(llm, TOKENS) == on
    stopped(llm)
    assert_same(off, stock(qwen))
    assert off != on


def run_on(llm: LLM, steps: int = 100) -> list[int]:
    """The tokens of the one request after so many steps or at its end."""
    tokens: list[int] = []
    for _ in range(steps):
        if not llm.llm_engine.has_unfinished_requests():
            break
        for output in llm.llm_engine.step():
            tokens = list(output.outputs[0].token_ids)
    return tokens


def test_the_last_layers_leaves_the_prefix_cache_and_running_requests_as_they_are(qwen):
    llm = start(qwen, written(qwen, make(qwen)), **CACHING)
    empty = ask(llm)
    blocks = cached_blocks(llm)
    assert ask(llm) == empty  # from the cache: what that alone does to the last bits is nothing here
    switch(llm, False)
    assert cached_blocks(llm) == blocks
    assert llm.reset_prefix_cache()
    stock = ask(llm)
    assert stock != empty
    assert cached_blocks(llm) == blocks  # the keys are stock's, too
    switch(llm, True)
    assert ask(llm) == empty  # served from what was filled without the router

    prompt, params = PROMPTS[-1], SamplingParams(max_tokens=24, **GREEDY)
    llm.llm_engine.add_request("a", {"prompt_token_ids": prompt}, params)
    before = run_on(llm, 10)
    (request,) = core_of(llm).scheduler.requests.values()
    computed = request.num_computed_tokens
    switch(llm, False)
    assert request.num_computed_tokens == computed  # nothing is computed again
    after = run_on(llm)
    assert after[: len(before)] == before
    stopped(llm)
    fresh = start(qwen, None, **CACHING)
    assert ask(fresh, [prompt + before], tokens=24 - len(before))[0][0] == after[len(before) :]
    stopped(fresh)


def test_an_earlier_layers_keeps_blocks_apart(qwen):
    llm = start(qwen, written(qwen, make(qwen, layer=0)), **CACHING)
    on, on_blocks = ask(llm), cached_blocks(llm)
    prompt, params = PROMPTS[-1], SamplingParams(max_tokens=24, **GREEDY)
    llm.llm_engine.add_request("a", {"prompt_token_ids": prompt}, params)
    before = run_on(llm, 10)
    switch(llm, False)
    assert not cached_blocks(llm)
    after = run_on(llm)
    assert after[: len(before)] == before
    off, off_blocks = ask(llm), cached_blocks(llm)
    assert off != on and off_blocks.isdisjoint(on_blocks)
    switch(llm, True)
    assert ask(llm) == on and cached_blocks(llm) == on_blocks
    core_of(llm).vllm_config.kv_transfer_config = object()
    assert "KV connector" in core_of(llm).cor_change(None, None, False)
    stopped(llm)
    fresh = start(qwen, None, **CACHING)
    assert ask(fresh) == off and cached_blocks(fresh).isdisjoint(on_blocks | off_blocks)
    assert ask(fresh, [prompt + before], tokens=24 - len(before))[0][0] == after[len(before) :]
    stopped(fresh)


@pytest.mark.parametrize(
    "ranks",
    [
        {"tensor_parallel_size": 2},
        # Compiled, since vLLM's CPU stages crash with --enforce-eager.
        {"pipeline_parallel_size": 2, "enforce_eager": False,
         "compilation_config": {"mode": 2, "backend": "eager", "custom_ops": ["all"]}},
    ],
    ids=["tensor", "pipeline"],
)  # fmt: skip
def test_two_ranks(mixtral, monkeypatch, ranks):
    """Every rank of a layer has the whole router; of two stages only the second one has this layer."""
    cor = written(mixtral, make(mixtral))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", cores.for_ranks(2))
    llm = start(mixtral, cor, worker_extension_cls="tests.parity.cpu_parallel.WorkerExtension", **ranks)
    on = answer(llm, TOKENS)
    held = [status["router"] is not None for status in core_of(llm).cor_status()]
    assert held == [len(ranks) == 1, True]
    switch(llm, False)
    off = answer(llm, TOKENS)
    stopped(llm)
    assert_same(on, alone(mixtral))
    assert_same(off, stock(mixtral))
    assert off != on


def worker_of(llm: LLM) -> Any:
    return core_of(llm).model_executor.driver_worker.worker


def test_after_new_weights(qwen, tmp_path):
    """Reloaded, it is put in again, on or off; other values for its router are refused, and it stays out."""
    llm = start(qwen, written(qwen, make(qwen)))
    on = answer(llm, TOKENS)
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    (status,) = core_of(llm).cor_status()
    assert status["router"]["on"] and verify.inspect(llm)["problems"] == []
    switch(llm, False)
    llm.collective_rpc("reload_weights")
    assert not core_of(llm).cor_status()[0]["router"]["on"]
    switch(llm, True)

    trained = model_copies.copy(qwen, tmp_path / "trained", model_copies.other_routers)
    with pytest.raises(GateError, match="new weights have come for the router of decoder layer 2"):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(trained)})
    assert not core_of(llm).cor_status()[0]["router"]["on"]
    assert "new weights have come" in core_of(llm).cor_change(None, None, True)
    (found,) = [p for p in verify.inspect(llm)["problems"] if "logits differ" in p]
    assert "layers.2" in found
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(qwen)})
    assert core_of(llm).cor_status()[0]["router"]["on"] and on
    stopped(llm)


def test_an_update_that_leaves_the_router_out(qwen, tmp_path):
    """A trainer that sends other tensors only: the router of the file is still in force."""
    llm = start(qwen, written(qwen, make(qwen)))
    worker = worker_of(llm)
    held = worker.cor_switch
    worker.weight_transfer_engine = Transfer(worker)
    sent = {n: t for n, t in model_copies.weights_of(qwen).items() if not n.endswith(model_copies.ROUTER)}
    model_copies.save(sent, tmp_path / "sent.safetensors")
    worker.start_weight_update()
    worker.update_weights({"file": tmp_path / "sent.safetensors"})
    worker.finish_weight_update()
    assert worker.cor_switch is held and held.in_force
    assert verify.inspect(llm)["problems"] == []
    stopped(llm)


def test_verify_finds_a_router_that_is_not_the_files(qwen, capsys):
    overlay = make(qwen)
    llm = start(qwen, written(qwen, overlay))
    report = verify.inspect(llm)
    assert report["problems"] == [] and report["layers"] == []
    (row,) = report["routers"]
    assert row["layer"] == 2 and row["as_expected"] == 1 and 0 < row["logits_error"] < 1e-5
    assert "Decoder layer 2 computes with the router of the router file." in verify.render(report)
    worker_of(llm).cor_switch.turn(False)
    (problem,) = verify.inspect(llm)["problems"]
    assert "layers.2.mlp.experts (worker 0): its router's logits differ" in problem
    stopped(llm)


def test_scores_and_router_together(qwen):
    """The scores were measured under the router: both are in force, and neither is without the other."""
    overlay = make(qwen)
    cor = written(qwen, overlay)
    values = make_scores(qwen, k=[1, 7, 3])
    model = values.config.model.model_copy(update={"router_overlay": overlay.fingerprint})
    values = dataclasses.replace(values, config=values.config.model_copy(update={"model": model}))
    path = qwen.parent / "together.scores.safetensors"
    scores.save(path, values)
    llm = start(qwen, {**cor, "scores": str(path)})
    report = verify.inspect(llm)
    assert report["problems"] == [] and len(report["layers"]) == 3 and len(report["routers"]) == 1
    assert "not served without the other" in core_of(llm).cor_change(None, None, False)
    assert core_of(llm).cor_change(0.3, None, None) == ""
    stopped(llm)
    with pytest.raises(MisfitError, match=r"measured under a router overlay .* serve with that file"):
        configured(qwen, {"scores": str(path)})
    other = written(qwen, make(qwen, seed=1), "other")
    with pytest.raises(MisfitError, match=r"measured under another overlay .*calibrate MODEL --cor-router"):
        configured(qwen, {**other, "scores": str(path)})
    scores.save(path, make_scores(qwen))
    with pytest.raises(MisfitError, match="measured under the model's own router"):
        configured(qwen, {**cor, "scores": str(path)})


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
    with pytest.raises(MisfitError, match=r"in float32 by this engine.* serve with --dtype bfloat16, or"):
        configured(qwen, written(qwen, make(qwen, dtype="bfloat16"), "bfloat16"))
    with pytest.raises(OverlayError, match="No such file"):
        configured(qwen, {"router": str(tmp_path / "absent")})


def test_the_start_says_what_speaks_against_the_file(qwen, caplog, monkeypatch):
    configured(qwen, written(qwen, make(qwen)))  # which sets up vLLM's own log, too
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    configured(qwen, written(qwen, make(qwen)))
    configured(qwen, written(qwen, make(qwen, objective="none")))
    configured(qwen, written(qwen, make(qwen)), load_format="dummy")
    first, second = (record.getMessage() for record in caplog.records if record.name == "vllm.cor")
    assert "this router is the model's own" in first and "dummy weights, so the router file's" in second


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


def test_a_router_kept_in_another_dtype_is_refused_after_the_load(qwen):
    """Models may keep their routers in float32, so that a file for float32 can be right in bfloat16."""
    with pytest.raises(GateError, match=r"kept in bfloat16 by this engine.*reroute --dtype bfloat16"):
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
