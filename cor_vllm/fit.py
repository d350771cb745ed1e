"""Does this scores file fit this model, and can this engine route it? Asked before any weight is loaded."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from cor_vllm.config import CorConfig
from cor_vllm.errors import CorError
from cor_vllm.fingerprint import Routers, read_routers
from cor_vllm.scores import Scores

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger("vllm.cor")  # below vLLM's own, whose level and format it takes on

# Formats whose files are the checkpoint itself, so that the routers in them can be compared.
_SAFETENSORS_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors")
_WITHOUT_DRAFT_MODEL = ("ngram", "ngram_gpu", "suffix")  # they guess from the text alone


class MisfitError(CorError):
    """A scores file of another model, or an engine that cannot be routed: one line with cause and remedy."""


def check(config: CorConfig, scores: Scores, engine: "VllmConfig") -> None:
    """Refuse what cannot be right.

    Raises:
        MisfitError: the file is another model's, or a feature of the engine would bypass the routing.
    """
    _check_engine(engine)
    _check_model(config.scores, scores, engine.model_config)
    _check_checkpoint(config.scores, scores, engine)


def _check_engine(engine: "VllmConfig") -> None:
    model = engine.model_config
    if model.using_transformers_backend():
        raise MisfitError(
            "the Transformers backend routes in its own code, which counterfactual routing cannot reach: "
            "leave out --model-impl transformers"
        )
    speculative = engine.speculative_config
    if speculative is not None and speculative.method not in _WITHOUT_DRAFT_MODEL:
        raise MisfitError(
            f"speculative decoding by {speculative.method!r} is not supported with counterfactual routing (a "
            "draft model's expert layers would be routed by another model's scores): use one of "
            f"{', '.join(_WITHOUT_DRAFT_MODEL)}, or leave out --speculative-config"
        )
    if engine.parallel_config.enable_elastic_ep:
        raise MisfitError(
            "elastic expert parallelism starts ranks that get their weights from other ranks, unnoticed by "
            "counterfactual routing: leave out --enable-elastic-ep"
        )
    if engine.parallel_config.all2all_backend == "flashinfer_nvlink_one_sided":
        raise MisfitError(
            "all2all backend 'flashinfer_nvlink_one_sided' needs one top_k for all layers: choose another"
        )


def _check_model(path: str, scores: Scores, model: "ModelConfig") -> None:
    file = scores.config.model
    _compare(path, "architecture", file.architecture, model.architecture)
    _compare(path, "num_hidden_layers", file.num_hidden_layers, model.get_total_num_hidden_layers())
    _compare(path, "num_experts", file.num_experts, model.get_num_experts())
    _compare(path, "top_k", file.top_k, model.get_num_experts_per_tok())


def _compare(path: str, field: str, in_file: object, in_model: object) -> None:
    if in_file != in_model:
        raise MisfitError(
            f"{path}: {field}: the scores file has {in_file}, the model has {in_model}; calibrate this model "
            "with `cor-vllm calibrate`, or serve the model that the file was made for"
        )


def _check_checkpoint(path: str, scores: Scores, engine: "VllmConfig") -> None:
    load_format = str(getattr(engine.load_config.load_format, "value", engine.load_config.load_format))
    if load_format == "dummy":
        logger.warning("CoR: dummy weights, so the scores file's fingerprint is not compared")
        return
    if load_format not in _SAFETENSORS_FORMATS:
        raise MisfitError(
            f"load format {load_format!r}: its routers cannot be compared with the scores file; "
            f"load the safetensors checkpoint ({', '.join(_SAFETENSORS_FORMATS)})"
        )
    routers = _routers(engine)
    file_layers = tuple(scores.layer_index.tolist())
    if file_layers != routers.layers:
        _compare(path, "number of MoE layers", len(file_layers), len(routers.layers))
        _compare(path, "layer_index", list(file_layers), list(routers.layers))
    _compare(path, "fingerprint", scores.config.model.fingerprint, routers.fingerprint)


def _routers(engine: "VllmConfig") -> Routers:
    folder = Path(engine.model_config.model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        # The same cache as vLLM's own loader, which finds the files there afterwards.
        folder = Path(
            snapshot_download(
                engine.model_config.model,
                revision=engine.model_config.revision,
                cache_dir=engine.load_config.download_dir,
                allow_patterns=["*.safetensors", "*.json"],
                ignore_patterns=["*/*"],  # GPT-OSS keeps second copies of its weights in folders
            )
        )
    return read_routers(folder)
