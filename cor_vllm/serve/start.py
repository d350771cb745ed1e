"""The start of an engine: flags into `additional_config["cor"]`, the check before any weight, the log.

The three public functions at the top each stand in the place of one method of vLLM's EngineArgs (seams.py).
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cor_vllm import overlay as overlay_file
from cor_vllm import scores as scores_file
from cor_vllm.overlay import RouterOverlay
from cor_vllm.scores import Scores
from cor_vllm.serve import cpu, fit, flags
from cor_vllm.serve.config import CorConfig, CorOptions, LayerRouting, disabled, doubts, plan
from cor_vllm.tensor_file import digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.cor")  # below vLLM's own, whose level and format it takes on


def add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """A parser of vLLM's engine flags then knows the --cor-… flags."""

    def add_with_cor(parser: Any) -> Any:
        return flags.add(original(parser))

    return add_with_cor


def from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Engine arguments of a command line then have its --cor-… flags in `additional_config["cor"]`."""

    def from_with_cor(cls: type, args: Any) -> Any:
        flags.merge(args)
        return original(cls, args)

    return from_with_cor


def create_engine_config(original: Callable[..., "VllmConfig"]) -> Callable[..., "VllmConfig"]:
    """An engine that has options of ours is checked before it starts, and says how it routes."""
    off = disabled()

    @functools.wraps(original)
    def create_with_cor(engine_args: Any, *args: Any, **kwargs: Any) -> "VllmConfig":
        additional = engine_args.additional_config or {}
        if "cor" not in additional:
            return original(engine_args, *args, **kwargs)
        if off:
            logger.warning("CoR: COR_DISABLE is set; serving with the model's own routing")
            engine_args.additional_config = {k: v for k, v in additional.items() if k != "cor"}
            return original(engine_args, *args, **kwargs)
        config, scores, overlay = _resolve(additional["cor"])
        layers = plan(config, scores) if scores else {}
        engine_args.additional_config = {**additional, "cor": _dump(config)}
        vllm_config = original(engine_args, *args, **kwargs)
        fit.check(config, scores, overlay, vllm_config)
        if layers:
            widen_capture(vllm_config, layers)
        # Of several API servers, each of which comes here, the process that starts them speaks for all.
        if engine_args._api_process_count == 1 or engine_args._api_process_rank < 0:
            if scores:
                _log_scores(config, scores, layers)
            if overlay:
                _log_overlay(config, overlay)
            for line in cpu.warnings(vllm_config):
                logger.warning("CoR: %s", line)
        return vllm_config

    return create_with_cor


def _resolve(options: Any) -> tuple[CorConfig, Scores | None, RouterOverlay | None]:
    """The validated options with absolute paths, the files' digests and defaults; and the files."""
    config = CorConfig.of(options)
    scores = overlay = None
    if config.scores is not None:
        path = str(Path(config.scores).absolute())
        data = scores_file.read_bytes(path)
        scores = scores_file.parse(data, path)
        config = config.resolved(scores.config.serving)
        config = config.model_copy(update={"scores": path, "sha256": digest(data)})
    if config.router is not None:
        path = str(Path(config.router).absolute())
        data = overlay_file.read_bytes(path)
        overlay = overlay_file.parse(data, path)
        config = config.model_copy(update={"router": path, "router_sha256": digest(data)})
    config.check_together()
    return config, scores, overlay


def _dump(config: CorConfig) -> CorOptions:
    # Must stay JSON: vLLM hashes additional_config into its compile-cache key.
    return CorOptions(config.model_dump(by_alias=True, exclude_none=True))


def widen_capture(vllm_config: "VllmConfig", layers: dict[int, LayerRouting]) -> None:
    """Make room for our widest layer in the buffer of --enable-return-routed-experts.

    It has the model's own top_k slots for every layer otherwise; CorRouter fills those that are left over.
    """
    if vllm_config.aux_output_config.enable_return_routed_experts:
        widest = max(layer.top_k for layer in layers.values())
        vllm_config.model_config.model_arch_config.num_experts_per_token = widest


def _log_scores(config: CorConfig, scores: Scores, layers: dict[int, LayerRouting]) -> None:
    logger.info(
        "CoR: %s, %d MoE layers, %d of them with λ·CEI, Σ k_l = %d (the model's own %d), scores %s",
        config.mode or "static k",
        len(layers),
        sum(layer.biased for layer in layers.values()),
        sum(layer.top_k for layer in layers.values()),
        scores.num_layers * scores.config.model.top_k,
        config.scores,
    )
    for line in doubts(config, scores):
        logger.warning("CoR: %s", line)


def _log_overlay(config: CorConfig, overlay: RouterOverlay) -> None:
    logger.info(
        "CoR: the router of decoder layer %d is that of %s (drift %.3g, objective %s)",
        overlay.layer,
        config.router,
        overlay.config.drift,
        overlay.config.training.objective,
    )
    if harm := overlay.config.harm():
        logger.warning("CoR: %s: %s", config.router, harm)
