"""Where the router of a router file goes in a worker's model, when, and what is refused."""

from typing import TYPE_CHECKING, Any

import torch

from cor_vllm.overlay import RouterOverlay
from cor_vllm.serve.config import CorConfig
from cor_vllm.serve.gate import ABSOLUTE, RELATIVE, GateError, Switch, is_unquantised
from cor_vllm.serve.layers import linear_of, moe_layers
from cor_vllm.serve.objects import Worker
from cor_vllm.serve.process import overlay_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def weights_arrived(worker: Worker, config: CorConfig) -> None:
    """Put the router of the file into the worker's model, now that it has got weights.

    The weights were compared with the file's model before if they are the first ones. Later ones are accepted
    only if this router's are the same as those.

    Raises:
        GateError: the file does not fit the model, or other weights have come for this router.
    """
    overlay = overlay_of(config)
    if overlay is None or not is_here(worker.vllm_config, overlay):
        return
    gate = find(worker.get_model(), overlay, config)
    held = switch_of(worker)
    if held is not None and held.is_untouched(gate):
        return
    if held is not None and not held.has_its_own(gate):
        held.lost = True
        raise GateError(
            f"{config.router}: new weights have come for the router of decoder layer {overlay.layer}, and "
            "the file was made for the old ones: start the server without --cor-router, or with a file that "
            "`cor-vllm reroute` makes for the new ones"
        )
    switch = Switch(gate, overlay.weight)
    wanted = overlay.weight.to(gate.params_dtype).float()
    if not torch.allclose(switch.rows.float(), wanted, rtol=RELATIVE, atol=ABSOLUTE):
        raise GateError(
            f"decoder layer {overlay.layer}: its kernel does not compute with the router of {config.router}: "
            "leave out --cor-router"
        )
    switch.turn(config.router_on if held is None else held.on)
    worker.cor_switch = switch


def switch_of(worker: Worker) -> Switch | None:
    """The two routers of the layer that this worker holds; None without a router file or on another stage."""
    found: Switch | None = getattr(worker, "cor_switch", None)
    return found


def is_here(vllm_config: "VllmConfig", overlay: RouterOverlay) -> bool:
    """Whether the layer is one of this worker's pipeline stage."""
    first, end = vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config)
    return bool(first <= overlay.layer < end)


def find(model: torch.nn.Module, overlay: RouterOverlay, config: CorConfig) -> Any:
    """The linear layer whose weight the file replaces, in a model that has it.

    Raises:
        GateError: there is none, or it is one whose weight cannot be replaced.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    layers = {extract_layer_index(name): name for name in moe_layers(model)}
    name = layers.get(overlay.layer)
    gate = linear_of(model, name) if name else None
    where = f"{config.router}: the router of decoder layer {overlay.layer}"
    if name is None or gate is None:
        raise GateError(
            f"{where}: {type(model).__name__} has none there that can be replaced; leave out --cor-router"
        )
    if reason := _refusal(gate, moe_layers(model)[name]):
        raise GateError(f"{where} {reason}")
    if list(overlay.weight.shape) != [gate.output_size, gate.input_size]:
        raise GateError(
            f"{where} has shape {[gate.output_size, gate.input_size]} here and {list(overlay.weight.shape)} "
            "in the file: serve the model that the file was made for"
        )
    if not can_hold(overlay, gate.params_dtype):
        raise GateError(f"{where} {dtype_refusal(overlay, gate.params_dtype)}")
    return gate


def can_hold(overlay: RouterOverlay, dtype: torch.dtype) -> bool:
    """Whether a dtype has every value of the file's weight, so that what is served is what was judged."""
    return torch.equal(overlay.weight.to(dtype).float(), overlay.weight)


def dtype_refusal(overlay: RouterOverlay, dtype: torch.dtype) -> str:
    """What is wrong with a router file for an engine that keeps the router in another dtype."""
    kept, wanted = str(dtype).removeprefix("torch."), overlay.config.dtype
    return (
        f"is kept in {kept} by this engine, and the file's was rounded to {wanted}: serve with --dtype "
        f"{wanted}, or make a file with `cor-vllm reroute --served-dtype {kept}`"
    )


def _refusal(gate: Any, runner: Any) -> str:
    """Why the weight of this linear layer cannot be replaced; empty if it can."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    if hasattr(gate, "base_layer"):
        return (
            "can be changed by LoRA adapters here, and a router file was not trained with any: leave out "
            "--enable-lora, or name other modules in --lora-target-modules"
        )
    if not isinstance(gate, ReplicatedLinear):
        return f"is a {type(gate).__name__}, of which a rank may hold a part only: leave out --cor-router"
    if not is_unquantised(gate):
        method = type(gate.quant_method).__name__
        return f"is quantised here ({method}): leave the routers out of the quantisation"
    if getattr(runner, "_fse_fuse_gate", False) or getattr(gate, "_rocm_bf16x3_weight_eligible", False):
        return (
            "is held by its kernel in a second form, which would keep the old weight: leave out --cor-router"
        )
    return ""
