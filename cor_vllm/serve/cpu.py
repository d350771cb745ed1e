"""What vLLM's CPU build has to be told, so that models with latent attention (DeepSeek) are right on it.

vLLM 0.32 and 0.33 have two faults there, with or without this plugin. Delete this file when they are mended:
- On a CPU with AMX latent attention goes to a backend that computes in bfloat16 only, whatever the dtype
  (CpuPlatform.get_attn_backend_cls).
- The kernel for rotary embeddings takes the token stride of a [tokens, heads, dim] tensor from its dimension
  of heads, and latent attention is what passes such tensors. Rotary embeddings that are scaled for DeepSeek
  (YaRN) have no such kernel and are right.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

BACKEND = "CPU_MLA"
ROTARY = "rotary_embedding"
BACKEND_FLAG = f"--attention-backend {BACKEND}"
ROTARY_FLAG = f"""--compilation-config '{{"custom_ops": ["-{ROTARY}"]}}'"""
_AMX = "vLLM takes its AMX backend for latent attention on this CPU, which computes in bfloat16 only"
_ROTARY = (
    "vLLM's CPU kernel for rotary embeddings is wrong for this model's latent attention, with or without "
    "counterfactual routing; tokens were up to 3 nats off"
)


def mend(engine_args: "EngineArgs") -> list[str]:
    """Choose what the model needs on this machine, for commands that start an engine of their own.

    What the user has chosen stays.

    Args:
        engine_args: changed in place.

    Returns:
        One line for each change: what it is, why, and that a server needs it, too.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    model, lines = engine_args.create_model_config(), []
    if (
        engine_args.attention_backend is None
        and engine_args.attention_config.backend is None
        and _dies(model, None)
    ):
        engine_args.attention_backend = BACKEND
        lines.append(f"{_AMX}: started with {BACKEND_FLAG}, which a server needs, too")
    operations = engine_args.compilation_config.custom_ops
    if _rotates_unscaled(model) and not {f"+{ROTARY}", f"-{ROTARY}"} & set(operations):
        operations.append(f"-{ROTARY}")
        lines.append(f"{_ROTARY}: started with {ROTARY_FLAG}, which a server needs, too")
    return lines


def mended_arguments(model: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`mend` for a command that starts vllm.LLM by arguments.

    Args:
        model: as for `vllm serve`.
        given: the arguments; those that are no engine's are passed over.

    Returns:
        The arguments with what the model needs, and one line for each change.
    """
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    engine_args = EngineArgs(model=model, **{name: value for name, value in given.items() if name in known})
    lines = mend(engine_args)
    if not lines:
        return given, []
    changed = {
        "attention_backend": engine_args.attention_backend,
        "compilation_config": engine_args.compilation_config,
    }
    return given | changed, lines


def refusal(vllm_config: "VllmConfig") -> str | None:
    """Why this engine would die while it loads or at its first request; None if it would not."""
    from vllm.platforms import current_platform

    model = vllm_config.model_config
    if not current_platform.is_cpu() or not _dies(model, vllm_config.attention_config.backend):
        return None
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{_AMX}, and the dtype is {dtype}: add {BACKEND_FLAG}, or --dtype bfloat16"


def warnings(vllm_config: "VllmConfig") -> list[str]:
    """One line for each way in which this engine will be wrong, with the remedy."""
    from vllm.platforms import current_platform

    wrong = (
        current_platform.is_cpu()
        and _rotates_unscaled(vllm_config.model_config)
        and vllm_config.compilation_config.is_custom_op_enabled(ROTARY)
    )
    return [f"{_ROTARY}: add {ROTARY_FLAG}"] if wrong else []


def _dies(model: "ModelConfig", backend: Any) -> bool:
    """Whether vLLM will take its AMX backend for a model that is not in bfloat16."""
    from vllm.platforms import CpuArchEnum, current_platform

    if not model.use_mla or model.dtype == torch.bfloat16 or getattr(backend, "name", backend) == BACKEND:
        return False
    # What CpuPlatform itself asks.
    x86 = current_platform.get_cpu_architecture() == CpuArchEnum.X86
    return x86 and torch.cpu._is_amx_tile_supported()


def _rotates_unscaled(model: "ModelConfig") -> bool:
    """Whether the model has latent attention, also if VLLM_MLA_DISABLE computes it as usual attention."""
    rope = getattr(model.hf_text_config, "rope_parameters", None) or {}
    return bool(model.is_deepseek_mla) and rope.get("rope_type", "default") == "default"
