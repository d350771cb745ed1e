"""Are the routers in a worker's memory those of its files? Asked once, when its weights are there."""

import logging
from typing import TYPE_CHECKING, Any

import torch

from cor_vllm.checkpoint import RouterTensors, router_layers
from cor_vllm.copies import RETRAINED
from cor_vllm.serve.fit import MisfitError, compare_files, files_of, format_of, loader_files
from cor_vllm.serve.gate import ABSOLUTE, RELATIVE, is_unquantised, weight_of
from cor_vllm.serve.layers import gates, moe_layers
from cor_vllm.serve.process import config_of, overlay_of, scores_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.cor")  # below vLLM's own, whose level and format it takes on


def check_loaded(model: torch.nn.Module, vllm_config: "VllmConfig") -> None:
    """Compare the loader's files with ours in this process, and the routers in memory with them.

    The front end has compared the files before the start; they may have changed since, or differ on this
    node. Values are compared after the cast to the dtype in which the engine keeps them.

    Args:
        model: of this worker, loaded; LoRA adapters do not count.

    Raises:
        MisfitError: the routers of some layers are others.
        FingerprintError: the files cannot be read.
    """
    config = config_of(vllm_config)
    if config is None or format_of(vllm_config) == "dummy":
        return
    files = loader_files(vllm_config)  # asked once: for a hub id the loader looks the files up
    scores = scores_of(config) if config.scores is not None else None
    compare_files(files_of(config, scores, overlay_of(config)), vllm_config, files)
    held = _gates(model)
    other, quantised = [], []
    for router in router_layers(files, vllm_config.model_config.get_total_num_hidden_layers()):
        if (gate := held.pop(router.layer, None)) is None:
            continue  # on another pipeline stage
        if is_unquantised(gate):
            if not _is_same(router, gate):
                other.append(router.layer)
        elif _is_near(router, gate):
            quantised.append(router.layer)
        else:
            other.append(router.layer)
    if other or held:
        raise MisfitError(
            f"{vllm_config.model_config.model}: the engine has loaded other routers in decoder layers "
            f"{sorted(other + list(held))} than its files hold, and only the files were compared with what "
            "it is routed by; start again, and keep the files as they are meanwhile"
        )
    if quantised:
        logger.warning(
            "CoR: the engine has quantised the routers of decoder layers %s, and its files were made "
            "for unquantised ones: leave the routers out of the quantisation",
            quantised,
        )


def _gates(model: torch.nn.Module) -> dict[int, Any]:
    """The linear layer that makes the router logits, by decoder layer number."""
    from vllm.model_executor.models.utils import extract_layer_index

    found = gates(model)
    for name in moe_layers(model):
        if name not in found:
            raise MisfitError(f"{name}: no router next to the experts; this model is not supported")
    return {extract_layer_index(name): gate for name, gate in found.items()}


def _is_same(router: RouterTensors, gate: Any) -> bool:
    """Every tensor of the file, after the cast to the engine's dtype, is in memory."""
    for name, stored in router.tensors.items():
        memory = weight_of(gate) if name == "weight" else getattr(gate, name, None)
        if memory is None or memory.shape != stored.shape:
            return False
        wanted = stored.to(gate.params_dtype if name == "weight" else memory.dtype).float()
        if not torch.allclose(memory.float().cpu(), wanted, rtol=RELATIVE, atol=ABSOLUTE):
            return False
    return True


def _is_near(router: RouterTensors, gate: Any) -> bool:
    """The weight in memory is the file's but for what a quantisation of the load makes of it."""
    stored, memory = router.tensors["weight"].float(), weight_of(gate).float().cpu()
    return memory.shape == stored.shape and bool((memory - stored).norm() <= RETRAINED * stored.norm())
