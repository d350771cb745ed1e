"""A router file in an engine: against transformers, off again, while serving, after new weights, refused."""

import dataclasses
import functools
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from cor_vllm import overlay as overlay_file
from cor_vllm import scores
from cor_vllm.overlay import RouterOverlay
from cor_vllm.serve.fit import MisfitError
from cor_vllm.serve.gate import GateError
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


def test_in_bfloat16_it_is_switched_too_and_verify_sees_it(qwen):
    llm = start(qwen, written(qwen, make(qwen, dtype="bfloat16")), dtype="bfloat16")
    on = answer(llm, TOKENS)
    report = verify.inspect(llm)
    assert report["problems"] == [] and report["layers"] == []
    (row,) = report["routers"]
    assert row["layer"] == 2 and row["as_expected"] == 1 and 0 < row["logits_error"] < 0.05
    assert "Decoder layer 2 computes with the router of the router file." in verify.render(report)
    switch(llm, False)
    assert answer(llm, TOKENS) == stock(qwen, "bfloat16") != on
    (problem,) = verify.inspect(llm)["problems"]
    assert "layers.2.mlp.experts (worker 0): its router's logits differ" in problem
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
