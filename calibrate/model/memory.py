"""Estimates from a model's dimensions how many rows fit into --max-memory."""

from typing import Any

from cor_vllm.calibrate.config import CalibrationError, CalibrationOptions
from cor_vllm.calibrate.model import limits
from cor_vllm.calibrate.model.families import num_experts
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.offload import in_words


def check_host_memory(needed: int, remedy: str = "lower --num-tokens, or give --perturb-scope token") -> None:
    """Raise a CalibrationError, before the first layer runs, if host memory is too small.

    Args:
        needed: bytes of the hidden states that wait on the host. They are not written to yet.
        remedy: what makes them fewer.
    """
    limit = limits.pages_limit()
    if needed > limit.free:
        raise CalibrationError(
            f"the variants' hidden states take {in_words(needed)} of host memory, {in_words(limit.free)} are "
            f"free {limit.name}; {remedy}"
        )


def waiting_bytes(options: CalibrationOptions, config: Any, itemsize: int) -> int:
    """Estimate the bytes of the sweep's hidden states on the host: sequences, their copies, variants."""
    hard = options.num_tokens * (100 - options.hard_percentile) / 100
    easy = options.num_tokens * options.easy_percentile / 100
    per_token = options.perturb_scope == "token"
    variants = hard * (config.num_experts_per_tok + 2) + (hard + easy if per_token else options.num_tokens)
    layers: int = config.num_hidden_layers
    return int((options.num_tokens + layers * variants) * config.hidden_size * itemsize)


def layer_rows(model: MoeModel, longest: int, max_memory: int) -> int:
    """How many rows one layer call may take: at least those of the longest sequence.

    Args:
        model: its dimensions count.
        longest: tokens of the longest sequence.
        max_memory: bytes that the call's activations may take, weights not counted.

    Raises:
        CalibrationError: not even one sequence fits.
    """
    row = bytes_per_row(model.config, longest, model.model.dtype.itemsize)
    rows = max_memory // row
    if rows < longest:
        raise CalibrationError(
            f"--max-memory {max_memory}: the longest sequence, {longest} tokens, needs "
            f"{row * longest} bytes; raise it or lower --seq-len"
        )
    return rows


def bytes_per_row(config: Any, longest: int, itemsize: int) -> int:
    """An upper bound of the bytes that one row of a layer call takes at the call's peak.

    Attention takes logits, their masked copy, the joined logits and probabilities, all float32 for every head
    and key, and query, key, value and output. Experts take the expert mask of transformers, int64 [N, K],
    with its copies, and gate, up and product of all K experts as if at once. To these come the residual
    stream, latents (MLA), norms and their float32 copies.
    """
    heads, hidden, top_k = config.num_attention_heads, config.hidden_size, config.num_experts_per_tok
    head = max(
        getattr(config, "head_dim", None) or hidden // heads,
        (getattr(config, "qk_nope_head_dim", None) or 0) + (getattr(config, "qk_rope_head_dim", None) or 0),
    )
    widths = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    wide = max(getattr(config, name, None) or 0 for name in widths)
    attention = 4 * 4 * heads * (longest + 2) + 5 * heads * head * itemsize
    latent = (getattr(config, "kv_lora_rank", None) or 0) + (getattr(config, "q_lora_rank", None) or 0)
    experts = 3 * 8 * top_k * (num_experts(config) + 1) + 4 * wide * top_k * itemsize
    return attention + experts + (hidden + latent) * (8 * itemsize + 4 * 4)


def head_rows(model: MoeModel, max_memory: int) -> int:
    """How many rows one call of the language-model head may take.

    A row takes its logits in the model's dtype and three times in float32.
    """
    return max(1, max_memory // (model.config.vocab_size * (model.model.dtype.itemsize + 3 * 4)))
