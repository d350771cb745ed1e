"""The MoE layers of a model: built with this layer's k_l and our router, found again, and checked."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from cor_vllm.errors import CorError
from cor_vllm.serve.compat import SUBSTITUTED_EXPERTS
from cor_vllm.serve.config import CorConfig, LayerRouting
from cor_vllm.serve.observe import COUNTERS
from cor_vllm.serve.process import config_of, layers_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


class RoutingError(CorError):
    """A MoE layer that would not be routed by us; the message names the layer."""


def factory(original: Callable[..., Any]) -> Callable[..., Any]:
    """FusedMoEFactory, which builds every MoE layer of vLLM, with this layer's k_l and our router."""
    from vllm.config import get_current_vllm_config

    signature = inspect.signature(original)

    @functools.wraps(original)
    def build_with_cor(*args: Any, **kwargs: Any) -> Any:
        config = config_of(get_current_vllm_config())
        if config is None or config.scores is None:  # a router file alone leaves the layers to vLLM
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return _build_layer(original, bound, config)

    return build_with_cor


def _build_layer(original: Any, bound: inspect.BoundArguments, config: CorConfig) -> Any:
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import layer as module
    from vllm.model_executor.models.utils import extract_layer_index

    from cor_vllm.serve.router import CorRouter

    vllm_config = get_current_vllm_config()
    arguments = bound.arguments
    prefix = arguments["prefix"]
    _refuse_layer(prefix, arguments)
    routing = layers_of(config).get(extract_layer_index(prefix))
    if routing is None:
        raise RoutingError(f"{prefix}: a MoE layer that the scores file does not have; calibrate this model")
    arguments["top_k"] = routing.top_k
    create_router = module.create_fused_moe_router

    def create(**options: Any) -> CorRouter:
        return CorRouter(
            create_router(**options),
            routing,
            options,
            logits_dtype=arguments["router_logits_dtype"] or vllm_config.model_config.dtype,
            widest=max(layer.top_k for layer in layers_of(config).values()),
            num_experts=arguments["num_experts"],
        )

    # The factory makes its router itself, with arguments worked out inside; wrapping that one call for the
    # time of this layer hands us all of them, the expert load balancer's state included.
    module.create_fused_moe_router = create
    try:
        runner = original(*bound.args, **bound.kwargs)
    finally:
        module.create_fused_moe_router = create_router
    _check_layer(prefix, runner)
    _add_buffers(runner, routing, config.observe, vllm_config.device_config.device)
    return runner


def _add_buffers(runner: Any, routing: LayerRouting, observe: bool, device: torch.device) -> None:
    """What the router reads and counts in, as buffers, whose memory vLLM moves and frees with the model's."""
    if routing.bias is not None:
        # A copy even on the CPU: it will be written to, and the plan is kept.
        runner.register_buffer("cor_bias", routing.bias.to(device, copy=True), persistent=False)
        runner.router.bias = runner.cor_bias
    if observe:
        counts = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        runner.register_buffer("cor_counts", counts, persistent=False)
        runner.router.counts = runner.cor_counts


def _refuse_layer(prefix: str, arguments: dict[str, Any]) -> None:
    """Layers whose selection is more than scores and top-k, each by the name of what it does instead."""
    groups = _groups_refused(arguments)
    reasons = {
        "a router of its own": arguments["router"] is not None,
        "a custom routing function": arguments["custom_routing_function"] is not None,
        "hash routing": arguments["hash_indices_table"] is not None,
        "zero experts": arguments["zero_expert_type"] is not None,
        "a vision routing bias": arguments["bias_vl"] is not None,
        "fused shared experts": arguments["fuse_shared_experts"],
        "router weights on the input": arguments["apply_router_weight_on_input"],
        f"{arguments['scoring_func']} scoring": arguments["scoring_func"] not in ("softmax", "sigmoid"),
        groups: bool(groups),
        "simulated routing (VLLM_MOE_ROUTING_SIMULATION_STRATEGY)": bool(
            os.environ.get("VLLM_MOE_ROUTING_SIMULATION_STRATEGY")
        ),
    }
    for reason, present in reasons.items():
        if present:
            raise RoutingError(
                f"{prefix}: {reason}: not supported by counterfactual routing; start without it"
            )


def _groups_refused(arguments: dict[str, Any]) -> str:
    """Why these groups of experts are refused; empty if they are not, or if there are no groups."""
    groups, experts = arguments["num_expert_group"], arguments["num_experts"]
    if not arguments["use_grouped_topk"] or (groups, arguments["topk_group"]) in ((1, 1), (0, 0)):
        return ""
    if arguments["e_score_correction_bias"] is None:
        return "grouped top-k without a score correction bias"
    if experts % groups or experts < 2 * groups:
        return f"{experts} experts in {groups} groups"
    return ""


def _check_layer(name: str, runner: Any) -> None:
    from cor_vllm.serve.router import CorRouter

    if not isinstance(runner.router, CorRouter):
        raise RoutingError(f"{name}: routed by {type(runner.router).__name__}, not by counterfactual routing")
    if runner.is_monolithic:
        kernel = type(runner.routed_experts.quant_method).__name__
        raise RoutingError(
            f"{name}: the expert kernel of {kernel} routes inside itself and would ignore counterfactual "
            "routing: choose another --moe-backend"
        )
    if type(runner.routed_experts).__name__ == SUBSTITUTED_EXPERTS:
        raise RoutingError(
            f"{name}: experts replaced by constants (MoNE): not supported by counterfactual routing; serve "
            "the model that was not pruned"
        )


def finish(model: torch.nn.Module, vllm_config: "VllmConfig", layers: dict[int, LayerRouting]) -> None:
    """Check that every layer of the file is routed by us, and make each router ready to serve.

    Args:
        model: of one worker, with its weights.
        vllm_config: of its engine.
        layers: the routing of the whole file by decoder layer number.

    Raises:
        RoutingError: a layer is not routed by us, or this worker's model lacks one of its layers.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    found = set()
    for name, runner in moe_layers(model).items():
        _check_layer(name, runner)
        runner.router.weights_loaded()
        found.add(extract_layer_index(name))
    first, end = vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config)
    missing = sorted({layer for layer in layers if first <= layer < end} - found)
    if missing:
        raise RoutingError(
            f"decoder layers {missing}: the scores file has them, but {type(model).__name__} built no MoE "
            "layer there that counterfactual routing can reach"
        )


def moe_layers(model: torch.nn.Module) -> dict[str, "MoERunner"]:
    """Every MoE layer of the model by its name, in order."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    return {name: module for name, module in model.named_modules() if isinstance(module, MoERunner)}


def kernel_name(runner: "MoERunner") -> str:
    """The class that computes a layer's experts, as far as vLLM names one; its quantisation method else."""
    method = runner.routed_experts.quant_method
    experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    return type(method if experts is None else experts).__name__


def gates(model: torch.nn.Module) -> dict[str, Any]:
    """The linear layer that makes the router logits of each MoE layer, by the MoE layer's name."""
    found = {name: linear_of(model, name) for name in moe_layers(model)}
    # Below a LoRA adapter.
    return {name: getattr(gate, "base_layer", gate) for name, gate in found.items() if gate is not None}


def linear_of(model: torch.nn.Module, name: str) -> Any:
    """What makes the router logits of the MoE layer `name`, with an adapter around it; None if unknown."""
    block = model.get_submodule(name.removesuffix(".base_layer").rpartition(".")[0])
    gate = getattr(block, "gate", None)
    return getattr(block, "router", None) if gate is None else gate
