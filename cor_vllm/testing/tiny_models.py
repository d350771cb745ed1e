"""Writes tiny random checkpoints of every supported family, which vLLM also accepts on a CPU.

For this project's tests and benchmarks, and for authors of other vLLM plugins who need a small model with
mixture-of-experts layers.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}

# Multi-head latent attention of the sizes that vLLM's CPU kernel takes.
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 2, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64, "v_head_dim": 32,
}  # fmt: skip
# Together they have expert counts that are not powers of two, softmax and sigmoid, groups, both ways of
# weighing, dense layers, shared experts and scaling.
_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {
        "head_dim": 32, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
        "intermediate_size": 64, "norm_topk_prob": True,
    }),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 64,
        "shared_expert_intermediate_size": 32, "norm_topk_prob": False, "mlp_only_layers": [1],
    }),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {
        "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32,
        "norm_topk_prob": False,
    }),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {
        "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 32,
    }),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM, {
        **_LATENT, "n_routed_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64,
        "moe_intermediate_size": 32, "n_shared_experts": 2, "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
        "norm_topk_prob": False,
    }),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM, {
        **_LATENT, "n_routed_experts": 16, "num_experts_per_tok": 3, "intermediate_size": 64,
        "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 4,
        "topk_group": 2, "norm_topk_prob": True,
    }),
    "glm4_moe": (Glm4MoeConfig, Glm4MoeForCausalLM, {
        "head_dim": 32, "n_routed_experts": 7, "num_experts_per_tok": 3, "intermediate_size": 64,
        "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "use_qk_norm": True, "attention_bias": True,
    }),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM, {
        "head_dim": 32, "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64,
        "sliding_window": 16,
        # vLLM's GPT-OSS always scales its rotary embedding.
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 64,
        },
    }),
}  # fmt: skip
FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def build(family: str, folder: Path, **overrides: Any) -> Path:
    """Write a tiny random checkpoint with a byte-level tokenizer; the same arguments give the same weights.

    Args:
        family: one of FAMILIES.
        folder: where the checkpoint is written; it is created.
        overrides: configuration values that replace the family's.

    Returns:
        `folder`.
    """
    create(family, **overrides).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def create(family: str, **overrides: Any) -> Any:
    """The model that `build` writes, in memory: float32, in evaluation mode, experts computed eagerly."""
    config_class, model_class, values = _FAMILIES[family]
    config = config_class(**{**COMMON, **values, **overrides}, architectures=[model_class.__name__])
    config._experts_implementation = "eager"
    model = model_class(config).eval()
    _randomise(model)
    return model


def _randomise(model: torch.nn.Module) -> None:
    """Weights of unit gain, so that tokens differ in their routing and experts matter to the loss."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name:
                continue
            if name.endswith(("bias", "sinks")):
                std = 0.2
            elif name.endswith(("gate.weight", "router.weight")):
                std = 2 * parameter.shape[-1] ** -0.5
            elif "embed_tokens" in name:
                std = 1.0
            elif "lm_head" in name:
                std = 1.5 * parameter.shape[-1] ** -0.5
            else:
                std = parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, std, generator=generator)
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2, generator=generator)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([*alphabet, "<s>", "</s>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(
        chat_template=template,
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
    )
