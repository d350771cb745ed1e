"""What cannot be right is refused by name, before weights load."""

import contextlib
import dataclasses
import importlib
import itertools
import json
import logging
import pkgutil
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cor_vllm import plugin, scores
from cor_vllm.scores import ScoresError
from cor_vllm.serve import compat, fit
from cor_vllm.serve.config import ConfigError
from cor_vllm.serve.fit import MisfitError
from cor_vllm.serve.layers import RoutingError
from cor_vllm.testing.make_scores import config_of, make
from tests.parity.engine import ENGINE, generate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def qwen(checkpoints) -> Path:
    return checkpoints["qwen3_moe"]


def configured(folder: Path, cor: object, **engine: object) -> Any:
    """As far as the checks before the engine: what `vllm serve` and LLM() both run first."""
    from vllm.engine.arg_utils import EngineArgs

    options = {k: v for k, v in ENGINE.items() if k != "compilation_config"} | engine
    return EngineArgs(str(folder), **options, additional_config={"cor": cor}).create_engine_config()


def write(
    folder: Path, tmp_path: Path, changes: dict[str, object] | None = None, **tensors: torch.Tensor
) -> dict:
    values = dataclasses.replace(make(folder), **tensors)
    if changes:
        raw = values.config.model_dump(by_alias=True)
        raw["model"].update(changes)
        values = dataclasses.replace(values, config=type(values.config).model_validate(raw))
    path = tmp_path / "scores.safetensors"
    scores.save(path, values)
    return {"scores": str(path)}


@pytest.fixture
def caplog_vllm(caplog, monkeypatch):
    """vLLM's loggers do not hand their records on to the root, where pytest listens."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


def test_a_file_that_fits_starts(qwen, tmp_path):
    configured(qwen, write(qwen, tmp_path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"architecture": "MixtralForCausalLM"},
            "architecture: the scores file has MixtralForCausalLM",
        ),
        ({"num_hidden_layers": 9}, "num_hidden_layers: the scores file has 9, the model has 3"),
        ({"top_k": 2}, "top_k: the scores file has 2, the model has 3"),
        ({"fingerprint": "0" * 64}, "fingerprint: the scores file has 0000"),
    ],
)
def test_a_file_of_another_model(qwen, tmp_path, changes, says):
    with pytest.raises(MisfitError, match=says) as caught:
        configured(qwen, write(qwen, tmp_path, changes))
    assert "\n" not in str(caught.value)
    assert "cor-vllm calibrate" in str(caught.value)  # the remedy


def test_a_file_with_other_layers(qwen, tmp_path):
    values = make(qwen)
    fewer = {name: tensor[:2] for name, tensor in values.tensors().items()}
    config = type(values.config).model_validate(config_of(qwen, values.k[:2].tolist()))
    path = tmp_path / "scores.safetensors"
    scores.save(path, dataclasses.replace(values, **fewer, config=config))
    with pytest.raises(MisfitError, match="number of MoE layers: the scores file has 2, the model has 3"):
        configured(qwen, {"scores": str(path)})


def test_weights_that_were_trained_on(qwen, tmp_path):
    """The same configuration with other routers is another model."""
    changed = shutil.copytree(qwen, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    name = next(n for n in weights if n.endswith("mlp.gate.weight"))
    weights[name][0, 0] += 1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(MisfitError, match="fingerprint"):
        configured(changed, write(qwen, tmp_path))


def test_a_requantised_copy_keeps_its_fingerprint(qwen, tmp_path):
    """Sharded into two files, experts in another dtype: the routers are the same."""
    copy = shutil.copytree(qwen, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    for part, half in enumerate((names[::2], names[1::2])):
        shard = {n: weights[n].bfloat16() if ".experts." in n else weights[n] for n in half}
        save_file(shard, copy / f"model-{part}.safetensors", {"format": "pt"})
    configured(copy, write(qwen, tmp_path))


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"model_impl": "transformers"}, "Transformers backend"),
        ({"all2all_backend": "flashinfer_nvlink_one_sided"}, "flashinfer_nvlink_one_sided"),
        ({"load_format": "sharded_state"}, "load format 'sharded_state'"),
    ],
)
def test_engines_that_cannot_be_routed(qwen, tmp_path, engine, says):
    with pytest.raises(MisfitError, match=says):
        configured(qwen, write(qwen, tmp_path), **engine)


def test_a_draft_model(qwen, tmp_path):
    draft = {"method": "draft_model", "model": str(qwen), "num_speculative_tokens": 2}
    with pytest.raises(MisfitError, match="speculative decoding by 'draft_model'"):
        configured(qwen, write(qwen, tmp_path), speculative_config=draft)


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp", "medusa", "mlp_speculator", "dflash"])
def test_draft_heads(qwen, tmp_path, method):
    """As the check sees them: without the head's own checkpoint vLLM does not get as far."""
    engine = configured(qwen, write(qwen, tmp_path))
    engine.speculative_config = SimpleNamespace(method=method)
    with pytest.raises(MisfitError, match=f"speculative decoding by '{method}'"):
        fit._check_engine(engine)


def test_elastic_expert_parallelism(qwen, tmp_path):
    engine = configured(qwen, write(qwen, tmp_path))
    engine.parallel_config.enable_elastic_ep = True  # vLLM itself takes it on GPUs only
    with pytest.raises(MisfitError, match="elastic expert parallelism"):
        fit._check_engine(engine)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lambda": 0.1, "swap_rate": 0.05}, "give one of them"),
        ({"lambda": -0.1}, "cor.lambda"),
        ({"lambda": float("nan")}, "cor.lambda"),
        ({"mode": "best"}, "cor.mode"),
        ({"static_k": 0}, "cor.static_k"),
        ({"static_k": 99}, "the model has 7 experts"),
        ({"static_k": 4, "mode": "layer"}, "static_k"),
        ({"mode": "off", "lambda": 0.1}, "has no λ"),
        ({"mode": "random", "weights": "fused"}, "fused"),
        ({"lamda": 0.1}, "cor.lamda"),
    ],
)
def test_options_that_contradict(qwen, tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        configured(qwen, {**write(qwen, tmp_path), **options})


def test_options_that_are_no_object(qwen):
    with pytest.raises(ConfigError, match="cor"):
        configured(qwen, "scores.safetensors")


def test_a_broken_file(qwen, tmp_path):
    path = tmp_path / "scores.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(ScoresError, match="header"):
        configured(qwen, {"scores": str(path)})
    with pytest.raises(ScoresError, match="No such file"):
        configured(qwen, {"scores": str(tmp_path / "absent")})


def test_dummy_weights_have_no_fingerprint_to_compare(qwen, tmp_path):
    configured(qwen, write(qwen, tmp_path, {"fingerprint": "0" * 64}), load_format="dummy")


def layer_arguments(monkeypatch, **change: object) -> None:
    """Have vLLM's Qwen3-MoE ask the layer factory for something it normally does not."""
    import vllm.model_executor.models.qwen3_moe as module

    plugin.install()  # before the test's own change, or it would hide vLLM's factory from us
    factory = module.FusedMoEFactory
    monkeypatch.setattr(module, "FusedMoEFactory", lambda **kwargs: factory(**{**kwargs, **change}))


def substituted_experts(*args: Any, **kwargs: Any) -> Any:
    """What 0.33 makes of a pruned checkpoint, on 0.32 too."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    experts = type(compat.SUBSTITUTED_EXPERTS, (RoutedExperts,), {})
    return experts(*args, **kwargs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"router": object()}, "a router of its own"),
        ({"custom_routing_function": print}, "a custom routing function"),
        ({"hash_indices_table": torch.zeros(1)}, "hash routing"),
        ({"zero_expert_type": "identity"}, "zero experts"),
        ({"bias_vl": torch.zeros(7)}, "a vision routing bias"),
        ({"scoring_func": "sqrtsoftplus"}, "sqrtsoftplus scoring"),
        ({"use_grouped_topk": True, "num_expert_group": 7, "topk_group": 2}, "grouped top-k without"),
        (
            {
                "use_grouped_topk": True,
                "num_expert_group": 2,
                "topk_group": 1,
                "e_score_correction_bias": torch.zeros(7),
            },
            "7 experts in 2 groups",
        ),
        ({"apply_router_weight_on_input": True}, "router weights on the input"),
        ({"routed_experts_cls": substituted_experts}, "experts replaced by constants"),
    ],
)
def test_layers_that_select_otherwise_are_named(qwen, tmp_path, monkeypatch, change, says):
    layer_arguments(monkeypatch, **change)
    with pytest.raises(RoutingError, match=rf"model\.layers\.0\.mlp\.experts: {says}"):
        generate(qwen, write(qwen, tmp_path), 1)


def test_an_expert_kernel_that_routes_inside_itself(qwen, tmp_path, monkeypatch):
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    monkeypatch.setattr(MoERunner, "is_monolithic", property(lambda self: True))
    with pytest.raises(RoutingError, match=r"model\.layers\.0\.mlp\.experts: the expert kernel"):
        generate(qwen, write(qwen, tmp_path), 1)


def test_kernels_that_route_inside_themselves_do_not_take_our_layers():
    """By the lists of routing methods in vLLM's own kernels, for every quantisation that they know."""
    from vllm.model_executor.layers.fused_moe import experts
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsMonolithic
    from vllm.model_executor.layers.quantization.utils import quant_utils

    for module in pkgutil.iter_modules(experts.__path__):
        importlib.import_module(f"{experts.__name__}.{module.name}")
    keys = [None, *(key for key in vars(quant_utils).values() if isinstance(key, quant_utils.QuantKey))]
    taking = set()
    for kernel in FusedMoEExpertsMonolithic.__subclasses__():
        for weights, activations in itertools.product(keys, keys):
            with contextlib.suppress(ValueError):  # a quantisation that it does not know
                if kernel._supports_routing_method(RoutingMethodType.Custom, weights, activations):
                    taking.add(kernel.__name__)
    # AMD's int4 experts take any method: 0.33 asks the router first, 0.32 stops at the check of the layer.
    assert taking == {"ZentorchExpertsInt4"}


def test_a_router_that_is_replaced_after_the_layer_is_built(qwen, tmp_path, monkeypatch):
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load_weights = DefaultModelLoader.load_weights

    def replace(self, model, model_config):
        load_weights(self, model, model_config)
        model.model.layers[1].mlp.experts.router = CPURouter(top_k=3, global_num_experts=7)

    monkeypatch.setattr(DefaultModelLoader, "load_weights", replace)
    with pytest.raises(RoutingError, match=r"layers\.1\.mlp\.experts: routed by CPURouter"):
        generate(qwen, write(qwen, tmp_path), 1)


def test_a_file_that_changes_between_the_check_and_the_worker(qwen, tmp_path, monkeypatch):
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    cor = write(qwen, tmp_path)
    create_model = BaseModelLoader.create_model

    def swap(self, *args, **kwargs):
        write(qwen, tmp_path, cei=torch.zeros(3, 7))
        return create_model(self, *args, **kwargs)

    monkeypatch.setattr(BaseModelLoader, "create_model", swap)
    with pytest.raises(ScoresError, match="has changed since the engine was started"):
        generate(qwen, cor, 1)


def test_options_stay_json_for_the_compile_cache_key(qwen, tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    options = {k: v for k, v in ENGINE.items() if k != "compilation_config"}

    def key(**cor: object) -> str:
        engine = EngineArgs(
            str(qwen), **options, additional_config={"cor": {**write(qwen, tmp_path), **cor}}
        ).create_engine_config()
        json.dumps(engine.additional_config)
        return engine.compute_hash()

    first = key()
    assert key() == first
    assert key(**{"lambda": 0.2}) != first
    path = Path(write(qwen, tmp_path)["scores"])
    values = dataclasses.replace(make(qwen), cei=torch.zeros(3, 7))
    scores.save(path, values)
    engine = EngineArgs(str(qwen), **options, additional_config={"cor": {"scores": str(path)}})
    assert engine.create_engine_config().compute_hash() != first  # another content under the same path


def test_a_file_whose_own_check_says_that_it_hurts_warns(qwen, tmp_path, caplog_vllm):
    values = make(qwen)
    raw = values.config.model_dump(by_alias=True)
    loss = {"mean": 2.0, "difference": 0.03, "sem": 0.01}
    raw["heldout"] = {"positions": 9, "hard_positions": 1, "modes": {"full": {"all": loss, "hard": loss}}}
    path = tmp_path / "scores.safetensors"
    scores.save(path, dataclasses.replace(values, config=type(values.config).model_validate(raw)))
    configured(qwen, {"scores": str(path), "mode": "expert"})
    assert "worse" not in caplog_vllm.text
    configured(qwen, {"scores": str(path)})
    assert "mode full is worse than stock routing by 0.0300 ± 0.0100 nats" in caplog_vllm.text
