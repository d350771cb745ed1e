"""Are the routers in a worker's memory those of the scores file? Asked once, when its weights are there."""

import logging
from typing import TYPE_CHECKING, Any

import torch

from cor_vllm.checkpoint import RouterTensors, router_layers
from cor_vllm.copies import RETRAINED
from cor_vllm.serve.fit import MisfitError, compare_files, format_of, loader_files
from cor_vllm.serve.layers import gates, moe_layers
from cor_vllm.serve.process import config_of, scores_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.cor")  # below vLLM's own, whose level and format it takes on

# A kernel that holds the weight in a form of its own gives it back as a product, with the kernel's rounding.
RELATIVE, ABSOLUTE = 2.0**-8, 2.0**-24
_ROWS = 1024  # of the identity matrix at a time


def check_loaded(model: torch.nn.Module, vllm_config: "VllmConfig") -> None:
    """Compare the loader's files with the scores file in this process, and the routers in memory with them.

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
    compare_files(config.scores, scores_of(config), vllm_config, files)
    held = _gates(model)
    other, quantised = [], []
    for router in router_layers(files, vllm_config.model_config.get_total_num_hidden_layers()):
        if (gate := held.pop(router.layer, None)) is None:
            continue  # on another pipeline stage
        if _is_unquantised(gate):
            if not _is_same(router, gate):
                other.append(router.layer)
        elif _is_near(router, gate):
            quantised.append(router.layer)
        else:
            other.append(router.layer)
    if other or held:
        raise MisfitError(
            f"{vllm_config.model_config.model}: the engine has loaded other routers in decoder layers "
            f"{sorted(other + list(held))} than its files hold, and the scores file was compared with the "
            "files; start again, and keep the files as they are meanwhile"
        )
    if quantised:
        logger.warning(
            "CoR: the engine has quantised the routers of decoder layers %s, and the scores were measured "
            "with unquantised ones: leave the routers out of the quantisation",
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


def _is_unquantised(gate: Any) -> bool:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    return isinstance(gate.quant_method, UnquantizedLinearMethod)


def _is_same(router: RouterTensors, gate: Any) -> bool:
    """Every tensor of the file, after the cast to the engine's dtype, is in memory."""
    for name, stored in router.tensors.items():
        memory = _weight(gate) if name == "weight" else getattr(gate, name, None)
        if memory is None or memory.shape != stored.shape:
            return False
        wanted = stored.to(gate.params_dtype if name == "weight" else memory.dtype).float()
        if not torch.allclose(memory.float().cpu(), wanted, rtol=RELATIVE, atol=ABSOLUTE):
            return False
    return True


def _is_near(router: RouterTensors, gate: Any) -> bool:
    """The weight in memory is the file's but for what a quantisation of the load makes of it."""
    stored, memory = router.tensors["weight"].float(), _weight(gate).float().cpu()
    return memory.shape == stored.shape and bool((memory - stored).norm() <= RETRAINED * stored.norm())


def _weight(gate: Any) -> torch.Tensor:
    """[N, H] the weight that a linear layer multiplies by.

    vLLM's CPU build packs it for its kernel and drops it, and quantised layers hold another form: its product
    with the identity matrix is the weight then.
    """
    weight: torch.Tensor | None = getattr(gate, "weight", None)
    if weight is not None and weight.shape == (gate.output_size, gate.input_size) and _is_unquantised(gate):
        return weight.detach()
    device = next(gate.parameters()).device
    identity = torch.eye(gate.input_size, dtype=gate.params_dtype, device=device)
    rows = [gate.quant_method.apply(gate, part, None) for part in identity.split(_ROWS)]
    return torch.cat(rows).T.contiguous()
