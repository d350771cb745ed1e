"""The start of an engine: flags into `additional_config["cor"]`, the check before any weight, the log.

The three public functions at the top each stand in the place of one method of vLLM's EngineArgs (seams.py).
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cor_vllm.scores import Scores, digest, parse, read_bytes
from cor_vllm.serve import cpu, fit, flags
from cor_vllm.serve.config import CorConfig, CorOptions, LayerRouting, disabled, doubts, plan

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
        config, scores = _resolve(additional["cor"])
        layers = plan(config, scores)
        engine_args.additional_config = {**additional, "cor": _dump(config)}
        vllm_config = original(engine_args, *args, **kwargs)
        fit.check(config, scores, vllm_config)
        widen_capture(vllm_config, layers)
        # Of several API servers, each of which comes here, the process that starts them speaks for all.
        if engine_args._api_process_count == 1 or engine_args._api_process_rank < 0:
            _log_start(config, scores, layers)
            for line in cpu.warnings(vllm_config):
                logger.warning("CoR: %s", line)
        return vllm_config

    return create_with_cor


def _resolve(options: Any) -> tuple[CorConfig, Scores]:
    """The validated options with an absolute path, the file's digest and defaults; and the file."""
    config = CorConfig.of(options)
    path = str(Path(config.scores).absolute())
    data = read_bytes(path)
    scores = parse(data, path)
    config = config.resolved(scores.config.serving)
    return config.model_copy(update={"scores": path, "sha256": digest(data)}), scores


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


def _log_start(config: CorConfig, scores: Scores, layers: dict[int, LayerRouting]) -> None:
    mode = config.mode or "static k"
    logger.info(
        "CoR: %s, %d MoE layers, %d of them with λ·CEI, Σ k_l = %d (the model's own %d), scores %s",
        mode,
        len(layers),
        sum(layer.biased for layer in layers.values()),
        sum(layer.top_k for layer in layers.values()),
        scores.num_layers * scores.config.model.top_k,
        config.scores,
    )
    for line in doubts(config, scores):
        logger.warning("CoR: %s", line)
