"""The routers of the table: that of --cor-router, and random ones that are as far from the model's own."""

from pathlib import Path

import torch

from cor_vllm import overlay as overlay_file
from cor_vllm.calibrate.model.loading import fitting, model_folder, model_info, read_config
from cor_vllm.checkpoint import router_layers, transformers_files
from cor_vllm.evaluate.conditions import Condition
from cor_vllm.evaluate.options import EvaluateOptions, read_overlay
from cor_vllm.fingerprint import read_routers
from cor_vllm.overlay import RouterOverlay, random_like


def check_router(options: EvaluateOptions) -> None:
    """Refuse a router file of another model.

    Raises:
        CalibrationError: it is one.
        FingerprintError: the model's own routers cannot be read.
        OverlayError: the router file cannot be read.
    """
    if options.router is not None:
        _fitting(options, options.router)


def router_of(options: EvaluateOptions, condition: Condition) -> RouterOverlay | None:
    """What takes the place of the model's own router in a condition; None if nothing does.

    Raises:
        CalibrationError, FingerprintError: as for check_router, of a random router, which is drawn around the
            model's own.
        OverlayError: the router file cannot be read.
    """
    if condition.router is None:
        return None
    assert options.router is not None, "a condition with another router has a router file"
    if condition.router.seed is None:
        return read_overlay(options)
    trained, folder = _fitting(options, options.router)
    return random_like(trained, _own_weight(folder, trained), condition.router.seed)


def router_path(options: EvaluateOptions, condition: Condition, overlay: RouterOverlay) -> Path:
    """The file of a condition's router; a random one is written into the folder of the results.

    Args:
        options: what to do.
        condition: which.
        overlay: of router_of.
    """
    assert options.router is not None and condition.router is not None, "there is an overlay"
    if condition.router.seed is None:
        return options.router
    path = options.output / f"{condition.name}.safetensors"
    overlay_file.save(path, overlay)
    return path


def _fitting(options: EvaluateOptions, path: Path) -> tuple[RouterOverlay, Path]:
    """The overlay, which belongs to the model, and the model's folder."""
    folder, revision = model_folder(options.model)
    config = read_config(folder)
    info = model_info(options.model, folder, revision, config, read_routers(folder))
    return fitting(path, info), folder


def _own_weight(folder: Path, overlay: RouterOverlay) -> torch.Tensor:
    """[N, H] the router in the checkpoint that the overlay replaces, so that every back end has the same."""
    routers = router_layers(transformers_files(folder), overlay.config.model.num_hidden_layers)
    return next(router.tensors["weight"] for router in routers if router.layer == overlay.layer)
