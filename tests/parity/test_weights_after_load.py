"""Weights that come after the load: reload, a trainer's update, sleep, LoRA. The routing must follow them.

A router's buffer holds λ·CEI and the model's own correction bias, of which a reload brings another.
"""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cor_vllm.serve.layers import RoutingError
from cor_vllm.testing import tiny_models
from cor_vllm.testing.make_scores import make
from tests.parity.engine import Completion, answer, generate, start
from tests.parity.test_parity import assert_same, varied, written

pytestmark = pytest.mark.slow
TOKENS = 8


@pytest.fixture(autouse=True)
def prepacked_again(monkeypatch) -> None:
    """Stock vLLM's CPU build reloads experts wrongly: it packs them for its kernel at the first load only."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    set_up = UnquantizedFusedMoEMethod._setup_kernel

    def set_up_and_pack(self, layer, **weights) -> None:
        again = self.moe_kernel is not None
        set_up(self, layer=layer, **weights)
        if again:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    monkeypatch.setattr(UnquantizedFusedMoEMethod, "_setup_kernel", set_up_and_pack)


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    return tiny_models.build("glm4_moe", tmp_path_factory.mktemp("models") / "before")


@pytest.fixture(scope="module")
def after(before) -> Path:
    """The same model some training later: all weights have moved, the correction bias most."""
    folder = tiny_models.build("glm4_moe", before.parent / "after")
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in sorted(weights):
        noise = torch.randn(weights[name].shape, generator=generator)
        weights[name] += noise * (0.5 if name.endswith("correction_bias") else 0.01)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def wanted(before, after) -> dict[Path, list[Completion]]:
    """What engines that were started with either say, by the same k_l and λ·CEI."""
    cei = make(before).cei
    answers = {}
    for folder in (before, after):
        values = make(folder, k=varied(folder), cei=cei)
        answers[folder] = generate(folder, written(folder, values), TOKENS)
    assert answers[before] != answers[after]
    return answers


@pytest.fixture
def llm(before, wanted) -> Any:
    llm = start(before, {"scores": str(before.parent / f"{before.name}.scores.safetensors")})
    yield llm
    del llm
    gc.collect()


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def test_reload(llm, before, after, wanted):
    assert_same(answer(llm, TOKENS), wanted[before])
    for folder in (after, before):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        llm.reset_prefix_cache()
        assert_same(answer(llm, TOKENS), wanted[folder])


def test_a_trainers_update(llm, after, wanted):
    """The three steps of a weight transfer, with an engine that has the weights already."""
    worker = worker_of(llm)
    worker.weight_transfer_engine = Transfer(worker)
    worker.start_weight_update()
    worker.update_weights({"file": after / "model.safetensors"})
    worker.finish_weight_update()
    llm.reset_prefix_cache()
    assert_same(answer(llm, TOKENS), wanted[after])


class Transfer:
    """What vLLM's transfer engines do with weights in checkpoint format, without the transfer."""

    def __init__(self, worker: Any) -> None:
        self.model, self.config = worker.get_model(), worker.model_config

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, info: dict[str, Path]) -> None:
        self.model.load_weights(load_file(info["file"]).items())

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.config)

    def reset_weight_update_target(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def test_sleep_level_2(llm, before, wanted):
    """vLLM's sleep on a GPU with the allocator played by the test: what is discarded becomes NaN."""
    from vllm.v1.worker.gpu_worker import Worker

    worker = worker_of(llm)
    tensors = [*worker.get_model().parameters(), *worker.get_model().buffers()]

    class Discard:
        def suspend(self, level: int) -> None:
            for tensor in tensors:
                tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)

        def resume(self, tags: list[str] | None) -> None:
            pass

    worker._sleep_mode_backend = Discard()
    Worker.sleep(worker, 2)
    assert all(r.router.bias.isnan().all() for r in runners(worker) if r.router.bias is not None)
    Worker.wake_up(worker, ["weights"])
    worker.reload_weights()
    llm.reset_prefix_cache()
    assert_same(answer(llm, TOKENS), wanted[before])


def runners(worker: Any) -> list[Any]:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    return [module for module in worker.get_model().modules() if isinstance(module, MoERunner)]


def test_a_layer_that_is_taken_over_after_the_load(before, wanted, monkeypatch):
    """LoRA wraps layers after the loader is done; what it leaves must still be routed by us."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load_model = CPUModelRunner.load_model

    def replace(self, *args, **kwargs):
        load_model(self, *args, **kwargs)
        self.model.model.layers[1].mlp.experts.router = CPURouter(top_k=3, global_num_experts=7)

    monkeypatch.setattr(CPUModelRunner, "load_model", replace)
    with pytest.raises(RoutingError, match=r"layers\.1\.mlp\.experts: routed by CPURouter"):
        start(before, {"scores": str(before.parent / f"{before.name}.scores.safetensors")})
