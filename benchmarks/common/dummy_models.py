"""Writes models of the published dimensions without weights: a configuration and a made-up tokenizer."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DeepseekV2Config, GptOssConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

from cor_vllm import scores
from cor_vllm.budget import allocate
from cor_vllm.testing import make_scores

GIB = 2**30
_LENGTH = 40_960

# Dimensions of the checkpoints' own config.json; the number of layers is what a benchmark chooses.
_FAMILIES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "qwen3-30b-a3b": (Qwen3MoeConfig, "Qwen3MoeForCausalLM", {
        "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False,
    }),
    "gpt-oss-20b": (GptOssConfig, "GptOssForCausalLM", {
        "vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
        "sliding_window": 128, "tie_word_embeddings": False, "max_position_embeddings": 131_072,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096,
        },
    }),
    "deepseek-v2-lite": (DeepseekV2Config, "DeepseekV2ForCausalLM", {
        "vocab_size": 102_400, "hidden_size": 2048, "intermediate_size": 10_944,
        "moe_intermediate_size": 1408, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1,
        "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    }),
}  # fmt: skip
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["self_attn", "router", "embed_tokens", "lm_head"],
}


def write(family: str, folder: Path, layers: int, **overrides: Any) -> Path:
    """Write a model folder that `vllm serve --load-format dummy` takes; `overrides` change its values."""
    config_class, architecture, values = _FAMILIES[family]
    values = {"max_position_embeddings": _LENGTH, **values, "num_hidden_layers": layers, **overrides}
    config = config_class(
        **values, architectures=[architecture], bos_token_id=0, eos_token_id=1, dtype="bfloat16"
    )
    config.save_pretrained(folder)
    # A word per token id: prompts of random ids survive the way through text and back.
    vocabulary = {f"t{i}": i for i in range(values["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t0", eos_token="t1", unk_token="t2", model_max_length=_LENGTH
    ).save_pretrained(folder)
    return folder


def write_scores(folder: Path, k: list[int] | None, file: Path) -> Path:
    """Write a scores file for the model in `folder`: `k` is k_l of each MoE layer; CEI has a long tail."""
    layers, experts = make_scores.make(folder).cei.shape
    cei = torch.rand(layers, experts, generator=torch.Generator().manual_seed(0)) ** 4
    scores.save(file, make_scores.make(folder, k=k, cei=cei))
    return file


def uneven(layers: int, top_k: int, low: int, high: int) -> list[int]:
    """k_l from `low` to `high` with the model's own sum, not in the order of depth."""
    order = torch.randperm(layers, generator=torch.Generator().manual_seed(0)).tolist()
    steps = max(layers - 1, 1)
    intensity = [float(2 ** (4 * place / steps)) for place in order]
    return allocate(intensity, layers * top_k, low, high)


def gibibytes(layers: int) -> float:
    """GiB of weights of a Qwen3-30B-A3B of so many layers in bf16."""
    values = _FAMILIES["qwen3-30b-a3b"][2]
    hidden, heads = values["hidden_size"], values["num_attention_heads"] + values["num_key_value_heads"]
    experts = 3 * values["num_experts"] * hidden * values["moe_intermediate_size"]
    layer = experts + 2 * hidden * heads * values["head_dim"]
    return 2 * (layers * layer + 2 * hidden * values["vocab_size"]) / GIB
