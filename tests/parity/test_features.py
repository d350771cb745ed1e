"""Features of vLLM that meet the routing: each gives the tokens that it gives without the feature."""

import dataclasses
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cor_vllm.testing.make_scores import make
from tests.parity.engine import Completion, answer, generate, start
from tests.parity.test_parity import assert_same, varied, written
from tests.parity.test_refusals import layer_arguments

pytestmark = pytest.mark.slow
TOKENS = 24


@pytest.fixture(scope="module")
def qwen(checkpoints) -> Path:
    return checkpoints["qwen3_moe"]


@pytest.fixture(scope="module")
def cor(qwen) -> dict[str, object]:
    return written(qwen, make(qwen, k=varied(qwen)))


@pytest.fixture(scope="module")
def plain(qwen, cor) -> list[Completion]:
    return generate(qwen, cor, TOKENS)


def metric(name: str) -> float:
    from vllm.v1.metrics.reader import get_metrics_snapshot

    return sum(found.value for found in get_metrics_snapshot() if found.name == f"vllm:{name}")


def test_ngram_speculation(qwen, cor, plain, monkeypatch):
    # In a process of its own: it imports numba, with which vLLM cannot start another engine in the process.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    config = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    drafted, accepted = metric("spec_decode_num_draft_tokens"), metric("spec_decode_num_accepted_tokens")
    got = generate(qwen, cor, TOKENS, speculative_config=config, disable_log_stats=False)
    assert_same(got, plain)
    drafted = metric("spec_decode_num_draft_tokens") - drafted
    accepted = metric("spec_decode_num_accepted_tokens") - accepted
    assert drafted > accepted > 0


def test_chunked_prefill_and_prefix_caching(qwen, cor, plain):
    """Prompts in pieces of 16 tokens; the second time, full blocks come from the cache."""
    llm = start(qwen, cor, max_num_batched_tokens=16, block_size=32, disable_log_stats=False)
    assert_same(answer(llm, TOKENS), plain)
    hits = metric("prefix_cache_hits")
    again = answer(llm, TOKENS, prompt_logprobs=None)  # vLLM computes the prompts anew for their own
    assert metric("prefix_cache_hits") > hits
    assert_same(again, [dataclasses.replace(completion, prompt_logprobs=[]) for completion in plain])
    stop(llm)


SLOTS = [3, 0, 6, 1, 5, 2, 4, 0]  # the expert in each physical slot; expert 0 has two


def map_and_record(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    record_enabled: torch.Tensor,
    num_unpadded_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """vLLM's kernel in torch; its CPU build leaves the ids as they are."""
    ids = topk_ids.long()
    replica = torch.arange(ids.numel()).view(ids.shape) % logical_replica_count[ids]
    physical = logical_to_physical_map[ids, replica]
    expert_load_view += torch.bincount(physical.flatten(), minlength=len(expert_load_view))
    return physical.to(topk_ids.dtype)


def test_expert_load_balancing(qwen, cor, plain, monkeypatch):
    """Experts moved and doubled: vLLM's router base class maps the ids that we give, and counts them."""
    from vllm.model_executor.layers.fused_moe.router import base_router

    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", map_and_record)
    layer_arguments(monkeypatch, enable_eplb=True)
    llm = start(qwen, cor)
    slots = torch.tensor(SLOTS)
    found = [torch.nonzero(slots == expert).flatten() for expert in range(7)]
    count = torch.tensor([len(of_expert) for of_expert in found])
    where = torch.stack([torch.cat([of_expert, of_expert])[:2] for of_expert in found])
    loads = torch.zeros(3, len(SLOTS), dtype=torch.int64)
    for layer, runner in enumerate(runners(llm)):
        for weight in (runner.routed_experts.w13_weight, runner.routed_experts.w2_weight):
            weight.data = weight.data[slots]
        runner.set_eplb_state(layer, loads, where.expand(3, -1, -1), count.expand(3, -1))
        runner.router.eplb_state.should_record_tensor = torch.tensor(True)
        runner.router.eplb_state.num_unpadded_tokens_tensors = [torch.tensor(0)]
    assert_same(answer(llm, TOKENS), plain)
    rows = loads.sum(1) // torch.tensor([runner.router.top_k for runner in runners(llm)])
    assert (rows == rows[0]).all() and rows[0] > 0
    assert (loads[:, 1] > 0).all() and (loads[:, 7] > 0).all()  # both copies of expert 0
    stop(llm)


def adapter(qwen: Path, folder: Path, targets: list[str]) -> tuple[Path, Path]:
    """A random LoRA adapter of these linear layers, and the model with the adapter merged in."""
    weights = load_file(qwen / "model.safetensors")
    generator, tensors = torch.Generator().manual_seed(2), {}
    for name in sorted(weights):
        if name.split(".")[-2] in targets:
            out, inside = weights[name].shape
            a, b = torch.randn(4, inside, generator=generator), torch.randn(out, 4, generator=generator)
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a * 0.1, b * 0.1
            weights[name] += 2 * (b * 0.1) @ (a * 0.1)
    lora, merged = folder / "lora", shutil.copytree(qwen, folder / "merged")
    lora.mkdir()
    save_file(tensors, lora / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, merged / "model.safetensors", {"format": "pt"})
    return lora, merged


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["v_proj", "gate"]], ids="-".join)
def test_lora_of_attention_and_router(qwen, cor, plain, tmp_path, monkeypatch, targets):
    """Requests with and without an adapter, by k_l and CEI of the base model.

    vLLM's CPU build has no experts for engines with LoRA: it takes a Triton kernel even if no adapter touches
    the experts, so the test has it choose as without LoRA.
    """
    from vllm.lora.request import LoRARequest
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as module

    choose = module.select_unquantized_moe_backend

    def choose_as_without(moe_config: Any) -> Any:
        return choose(dataclasses.replace(moe_config, is_lora_enabled=False))

    monkeypatch.setattr(module, "select_unquantized_moe_backend", choose_as_without)
    lora, merged = adapter(qwen, tmp_path, targets)
    options = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": targets}
    llm = start(qwen, cor, **options)
    assert_same(answer(llm, TOKENS), plain)
    got = answer(llm, TOKENS, lora_request=LoRARequest("adapter", 1, str(lora)))
    stop(llm)
    assert [a.tokens for a in got] != [a.tokens for a in plain]
    same = make(merged, k=varied(qwen), cei=make(qwen).cei)  # the merged model's file, with the base's scores
    assert_same(got, generate(merged, written(merged, same), TOKENS))


def runners(llm: Any) -> list[Any]:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()
    return [module for module in model.modules() if isinstance(module, MoERunner)]


def stop(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()
    gc.collect()
