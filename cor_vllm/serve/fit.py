"""Does this scores file fit this model, and can this engine route it? Asked before any weight is loaded."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from cor_vllm.copies import Difference, compare
from cor_vllm.errors import CorError
from cor_vllm.fingerprint import Routers, routers_of
from cor_vllm.scores import Scores
from cor_vllm.serve import cpu
from cor_vllm.serve.config import CorConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger("vllm.cor")  # below vLLM's own, whose level and format it takes on

# Formats whose files are the checkpoint itself, so that the routers in them can be compared.
_SAFETENSORS_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "mistral")
_WITHOUT_DRAFT_MODEL = ("ngram", "ngram_gpu", "suffix")  # they guess from the text alone


class MisfitError(CorError):
    """A scores file of another model, or an engine that cannot be routed: one line with cause and remedy."""


def check(config: CorConfig, scores: Scores, vllm_config: "VllmConfig") -> None:
    """Refuse what cannot be right.

    Raises:
        MisfitError: the file is another model's, or a feature of the engine would bypass the routing.
    """
    _check_engine(vllm_config)
    _check_model(config.scores, scores, vllm_config.model_config)
    _check_checkpoint(config.scores, scores, vllm_config)


def _check_engine(vllm_config: "VllmConfig") -> None:
    model = vllm_config.model_config
    if model.using_transformers_backend():
        raise MisfitError(
            "the Transformers backend routes in its own code, which counterfactual routing cannot reach: "
            "leave out --model-impl transformers"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _WITHOUT_DRAFT_MODEL:
        raise MisfitError(
            f"speculative decoding by {speculative.method!r} is not supported with counterfactual routing (a "
            "draft model's expert layers would be routed by another model's scores): use one of "
            f"{', '.join(_WITHOUT_DRAFT_MODEL)}, or leave out --speculative-config"
        )
    if vllm_config.parallel_config.enable_elastic_ep:
        raise MisfitError(
            "elastic expert parallelism starts ranks that get their weights from other ranks, unnoticed by "
            "counterfactual routing: leave out --enable-elastic-ep"
        )
    if vllm_config.parallel_config.all2all_backend == "flashinfer_nvlink_one_sided":
        raise MisfitError(
            "all2all backend 'flashinfer_nvlink_one_sided' needs one top_k for all layers: choose another"
        )
    if reason := cpu.refusal(vllm_config):
        raise MisfitError(reason)


def _check_model(path: str, scores: Scores, model: "ModelConfig") -> None:
    file = scores.config.model
    _compare(path, "architecture", file.architecture, model.architecture)
    _compare(path, "num_hidden_layers", file.num_hidden_layers, model.get_total_num_hidden_layers())
    _compare(path, "num_experts", file.num_experts, model.get_num_experts())
    top_k = model.get_num_experts_per_tok()
    static = f"; for {top_k} experts per token in every layer, leave the model's top_k and use --cor-static-k"
    _compare(path, "top_k", file.top_k, top_k, f"{static} {top_k}")


def _compare(path: str, field: str, in_file: object, in_model: object, more: str = "") -> None:
    if in_file != in_model:
        raise MisfitError(
            f"{path}: {field}: the scores file has {in_file}, the model has {in_model}; calibrate this model "
            f"with `cor-vllm calibrate`, or serve the model that the file was made for{more}"
        )


def _check_checkpoint(path: str, scores: Scores, vllm_config: "VllmConfig") -> None:
    load_format = format_of(vllm_config)
    if load_format == "dummy":
        logger.warning("CoR: dummy weights, so the scores file's fingerprint is not compared")
        return
    if load_format not in _SAFETENSORS_FORMATS:
        raise MisfitError(
            f"load format {load_format!r}: its routers cannot be compared with the scores file; "
            f"load the safetensors checkpoint ({', '.join(_SAFETENSORS_FORMATS)})"
        )
    for line in compare_files(path, scores, vllm_config, loader_files(vllm_config)):
        logger.warning("CoR: %s", line)


def format_of(vllm_config: "VllmConfig") -> str:
    """The name of the engine's load format."""
    return str(getattr(vllm_config.load_config.load_format, "value", vllm_config.load_config.load_format))


def compare_files(path: str, scores: Scores, vllm_config: "VllmConfig", files: list[Path]) -> list[str]:
    """Compare the routers in the files that the engine's loader loads with those of the scores file.

    Args:
        path: the scores file's.
        files: of `loader_files`.

    Returns:
        What is accepted and still worth a line.

    Raises:
        MisfitError: they are another model's.
        FingerprintError: the files cannot be read.
    """
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    return _compare_routers(path, scores, routers_of(files, layers))


def loader_files(vllm_config: "VllmConfig") -> list[Path]:
    """The files that vLLM's loader loads, in its order: found, and downloaded if need be, by the loader.

    Raises:
        MisfitError: it finds none, or no safetensors, or one that the index names is missing.
    """
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.weight_utils import _natural_sort_key

    model = vllm_config.model_config
    try:
        folder, files, safetensors, _ = get_model_loader(vllm_config.load_config)._prepare_weights(
            model.model,
            subfolder=None,
            revision=model.revision,
            fall_back_to_pt=False,
            allow_patterns_overrides=None,
        )
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise MisfitError(
            f"{model.model}: vLLM finds no weights to load ({type(error).__name__}: {reason}); download the "
            "model again"
        ) from error
    if not safetensors:
        raise MisfitError(
            f"{folder}: no *.safetensors file; a scores file can only be matched to a safetensors checkpoint"
        )
    return [Path(file) for file in sorted(files, key=_natural_sort_key)]


def _compare_routers(path: str, scores: Scores, found: Routers) -> list[str]:
    file_layers = tuple(scores.layer_index.tolist())
    if file_layers != found.layers:
        if missing := sorted(set(file_layers) - set(found.layers)):
            raise MisfitError(
                f"{path}: the model's files have no router for decoder layers {missing}, and the scores file "
                "does: if a file is missing, download the model again; if it is another model, calibrate it"
            )
        _compare(path, "number of MoE layers", len(file_layers), len(found.layers))
        _compare(path, "layer_index", list(file_layers), list(found.layers))
    model = scores.config.model
    if model.routers is None:
        more = (
            " (this file is of the first version, which compares the routers' bytes: a copy in another dtype "
            "cannot be told from another model, and has to be calibrated again)"
        )
        _compare(path, "fingerprint", model.fingerprint, found.fingerprint, more)
        return []
    if [router.layer for router in model.routers] != list(file_layers):
        raise MisfitError(f"{path}: model.routers: not the layers of layer_index; calibrate again")
    difference = compare(model.routers, found.info)
    if difference.other:
        more = f" (the routers of decoder layers {list(difference.other)} have other values)"
        _compare(path, "fingerprint", model.fingerprint, found.fingerprint, more)
    _refuse_rescaled(path, difference)
    same_bytes = all(a.tensors == b.tensors for a, b in zip(model.routers, found.info, strict=True))
    if same_bytes:  # otherwise the file contradicts itself
        _compare(path, "fingerprint", model.fingerprint, found.fingerprint)
    return _notes(difference)


def _refuse_rescaled(path: str, difference: Difference) -> None:
    if difference.rescaled:
        raise MisfitError(
            f"{path}: in decoder layers {list(difference.rescaled)} the norm before the router has other "
            "scales than in the model that the file was made for, and the router does not make up for them, "
            "so it reads something else (some quantisers rescale this norm and leave out the router): "
            "calibrate this model, or serve another copy"
        )


def _notes(difference: Difference) -> list[str]:
    notes = []
    if difference.folded:
        notes.append(
            f"the routers of decoder layers {list(difference.folded)} were rescaled together with the norm "
            "before them, as AWQ does; they compute what the scores file was made for"
        )
    if difference.retrained:
        notes.append(
            f"the routers of decoder layers {list(difference.retrained)} are those of the scores file, but "
            "the norm before them is not: if the rest of the model was trained further, calibrate it again"
        )
    return notes
