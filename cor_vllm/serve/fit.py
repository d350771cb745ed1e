"""Do these files fit this model, and can this engine route by them? Asked before any weight is loaded."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cor_vllm.copies import Difference, compare
from cor_vllm.errors import CorError
from cor_vllm.fingerprint import Routers, routers_of
from cor_vllm.metadata import ModelInfo
from cor_vllm.overlay import RouterOverlay
from cor_vllm.scores import Scores
from cor_vllm.serve import cpu
from cor_vllm.serve.config import CorConfig
from cor_vllm.serve.overlaid import can_hold, dtype_refusal

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = logging.getLogger("vllm.cor")  # below vLLM's own, whose level and format it takes on

# Formats whose files are the checkpoint itself, so that the routers in them can be compared.
_SAFETENSORS_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "mistral")
_WITHOUT_DRAFT_MODEL = ("ngram", "ngram_gpu", "suffix")  # they guess from the text alone


class MisfitError(CorError):
    """A file of another model, or an engine that cannot be routed: one line with cause and remedy."""


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A file that belongs to one model, as far as it says which."""

    path: str
    noun: str
    remake: str  # how a model gets such a file; goes on after "; "
    model: ModelInfo
    layers: tuple[int, ...] | None  # every MoE layer; None if the file does not say
    replaced: int | None = None  # the layer whose router's values it replaces

    @classmethod
    def of_scores(cls, path: str, scores: Scores) -> Self:
        """A scores file."""
        remake = "calibrate this model with `cor-vllm calibrate`"
        return cls(path, "scores file", remake, scores.config.model, tuple(scores.layer_index.tolist()))

    @classmethod
    def of_overlay(cls, path: str, overlay: RouterOverlay) -> Self:
        """A router file."""
        routers = overlay.config.model.routers
        layers = None if routers is None else tuple(router.layer for router in routers)
        remake = "make one for this model with `cor-vllm reroute`"
        return cls(path, "router file", remake, overlay.config.model, layers, overlay.layer)


def files_of(config: CorConfig, scores: Scores | None, overlay: RouterOverlay | None) -> list[ModelFile]:
    """The files that the options name.

    Args:
        config: the options.
        scores: their scores file, if they name one.
        overlay: their router file, if they name one.
    """
    found = []
    if scores is not None and config.scores is not None:
        found.append(ModelFile.of_scores(config.scores, scores))
    if overlay is not None and config.router is not None:
        found.append(ModelFile.of_overlay(config.router, overlay))
    return found


def check(
    config: CorConfig, scores: Scores | None, overlay: RouterOverlay | None, vllm_config: "VllmConfig"
) -> None:
    """Refuse what cannot be right.

    Args:
        config: the options, with at least one of the two files.
        scores: the scores file that they name.
        overlay: the router file that they name.
        vllm_config: of the engine, before any weight is loaded.

    Raises:
        MisfitError: a file is another model's, the files are not of one measurement, or a feature of the
            engine would bypass the routing.
    """
    _check_pair(config, scores, overlay)
    _check_engine(vllm_config)
    model = vllm_config.model_config
    files = files_of(config, scores, overlay)
    for file in files:
        _check_model(file, model)
    # A float32 file may be right: some models keep their routers in float32, whatever the rest has.
    if overlay is not None and overlay.config.dtype != "float32" and not can_hold(overlay, model.dtype):
        raise MisfitError(
            f"{config.router}: the router of decoder layer {overlay.layer} "
            f"{dtype_refusal(overlay, model.dtype)}"
        )
    _check_checkpoint(files, vllm_config)


def _check_pair(config: CorConfig, scores: Scores | None, overlay: RouterOverlay | None) -> None:
    """CEI of one router means nothing to another."""
    measured_under = None if scores is None else scores.config.model.router_overlay
    given = None if overlay is None else overlay.fingerprint
    if scores is None or measured_under == given:
        return
    if overlay is None:
        raise MisfitError(
            f"{config.scores}: these scores were measured under a router overlay (fingerprint "
            f"{measured_under}): serve with that file as --cor-router, or calibrate the model without one"
        )
    under = "the model's own router" if measured_under is None else f"another overlay ({measured_under})"
    raise MisfitError(
        f"{config.scores}: these scores were measured under {under}, and --cor-router replaces the router of "
        f"decoder layer {overlay.layer}: measure them again with `cor-vllm calibrate MODEL --cor-router "
        f"{config.router} --output …`, or leave out one of the two"
    )


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


def _check_model(file: ModelFile, model: "ModelConfig") -> None:
    _compare(file, "architecture", file.model.architecture, model.architecture)
    _compare(file, "num_hidden_layers", file.model.num_hidden_layers, model.get_total_num_hidden_layers())
    _compare(file, "num_experts", file.model.num_experts, model.get_num_experts())
    top_k = model.get_num_experts_per_tok()
    static = f"; for {top_k} experts per token in every layer, leave the model's top_k and use --cor-static-k"
    _compare(file, "top_k", file.model.top_k, top_k, "" if file.replaced is not None else f"{static} {top_k}")


def _compare(file: ModelFile, field: str, in_file: object, in_model: object, more: str = "") -> None:
    if in_file != in_model:
        raise MisfitError(
            f"{file.path}: {field}: the {file.noun} has {in_file}, the model has {in_model}; {file.remake}, "
            f"or serve the model that the file was made for{more}"
        )


def _check_checkpoint(files: Sequence[ModelFile], vllm_config: "VllmConfig") -> None:
    load_format = format_of(vllm_config)
    named = " and ".join(file.noun for file in files)
    if load_format == "dummy":
        logger.warning("CoR: dummy weights, so the %s's fingerprint is not compared", named)
        return
    if load_format not in _SAFETENSORS_FORMATS:
        raise MisfitError(
            f"load format {load_format!r}: its routers cannot be compared with the {named}; "
            f"load the safetensors checkpoint ({', '.join(_SAFETENSORS_FORMATS)})"
        )
    for line in compare_files(files, vllm_config, loader_files(vllm_config)):
        logger.warning("CoR: %s", line)


def format_of(vllm_config: "VllmConfig") -> str:
    """The name of the engine's load format."""
    return str(getattr(vllm_config.load_config.load_format, "value", vllm_config.load_config.load_format))


def compare_files(
    files: Sequence[ModelFile], vllm_config: "VllmConfig", weights: Sequence[Path]
) -> list[str]:
    """Compare the routers in the files that the engine's loader loads with those of our files.

    Args:
        files: ours.
        vllm_config: of the engine.
        weights: of `loader_files`.

    Returns:
        What is accepted and still worth a line.

    Raises:
        MisfitError: they are another model's.
        FingerprintError: the files cannot be read.
    """
    found = routers_of(weights, vllm_config.model_config.get_total_num_hidden_layers())
    return [line for file in files for line in _compare_routers(file, found)]


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


def _compare_routers(file: ModelFile, found: Routers) -> list[str]:
    if file.layers is not None and file.layers != found.layers:
        if missing := sorted(set(file.layers) - set(found.layers)):
            raise MisfitError(
                f"{file.path}: the model's files have no router for decoder layers {missing}, and the "
                f"{file.noun} does: if a file is missing, download the model again; if it is another model, "
                f"{file.remake}"
            )
        _compare(file, "number of MoE layers", len(file.layers), len(found.layers))
        _compare(file, "layer_index", list(file.layers), list(found.layers))
    model = file.model
    if model.routers is None:
        more = (
            " (this file is of the first version, which compares the routers' bytes: a copy in another dtype "
            "cannot be told from another model, and has to be calibrated again)"
        )
        _compare(file, "fingerprint", model.fingerprint, found.fingerprint, more)
        return []
    if [router.layer for router in model.routers] != list(found.layers):
        raise MisfitError(f"{file.path}: model.routers: not the layers of layer_index; {file.remake}")
    difference = compare(model.routers, found.info)
    if difference.other:
        more = f" (the routers of decoder layers {list(difference.other)} have other values)"
        _compare(file, "fingerprint", model.fingerprint, found.fingerprint, more)
    _refuse_rescaled(file, difference)
    same_bytes = all(a.tensors == b.tensors for a, b in zip(model.routers, found.info, strict=True))
    if same_bytes:  # otherwise the file contradicts itself
        _compare(file, "fingerprint", model.fingerprint, found.fingerprint)
    return _notes(file, difference)


def _refuse_rescaled(file: ModelFile, difference: Difference) -> None:
    if difference.rescaled:
        raise MisfitError(
            f"{file.path}: in decoder layers {list(difference.rescaled)} the norm before the router has "
            "other scales than in the model that the file was made for, and the router does not make up for "
            "them, so it reads something else (some quantisers rescale this norm and leave out the router): "
            f"{file.remake}, or serve another copy"
        )
    if file.replaced in difference.folded:
        raise MisfitError(
            f"{file.path}: the router of decoder layer {file.replaced} was rescaled together with the norm "
            "before it, as AWQ does, so the values in the file do not fit: serve another copy, or "
            f"{file.remake}"
        )


def _notes(file: ModelFile, difference: Difference) -> list[str]:
    notes = []
    if difference.folded:
        notes.append(
            f"the routers of decoder layers {list(difference.folded)} were rescaled together with the norm "
            f"before them, as AWQ does; they compute what the {file.noun} was made for"
        )
    if difference.retrained:
        notes.append(
            f"the routers of decoder layers {list(difference.retrained)} are those of the {file.noun}, but "
            f"the norm before them is not: if the rest of the model was trained further, {file.remake}"
        )
    return notes
