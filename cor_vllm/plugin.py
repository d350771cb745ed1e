"""Installs counterfactual routing in vLLM: flags, the check before start, the router of every MoE layer.

Each function here wraps one function of vLLM; the docstring says what it adds. Everything is idempotent,
since vLLM installs its plugins in every process, some of them several times, and nothing happens where
`additional_config["cor"]` is absent.
"""

import functools
import inspect
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cor_vllm.errors import CorError
from cor_vllm.live import control, endpoint
from cor_vllm.scores import Scores, digest, parse, read_bytes
from cor_vllm.serve import compat, cpu, fit, flags
from cor_vllm.serve.config import CorConfig, CorOptions, LayerRouting, disabled, doubts, plan
from cor_vllm.serve.observe import COUNTERS
from cor_vllm.serve.process import config_of, layers_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.cor")  # below vLLM's own, whose level and format it takes on
_installed = False


class RoutingError(CorError):
    """A MoE layer that would not be routed by us; the message names the layer."""


def install() -> None:
    """Wrap vLLM's functions once per process.

    With COR_DISABLE=1 the flags stay known, so that a command line keeps working, and do nothing.

    Raises:
        UnsupportedVersion: this vLLM is not one that the plugin knows.
    """
    global _installed
    if _installed:
        return
    off = disabled()
    if not off:
        compat.check_version()
    _wrap_engine_args(off)
    if not off:
        from cor_vllm.verify import worker

        _wrap_factory()
        worker.install()
        control.install()
        endpoint.install()
    _installed = True


def _wrap_engine_args(off: bool) -> None:
    """The --cor-… flags, their way into additional_config["cor"], and the check before the engine starts."""
    from vllm.engine.arg_utils import EngineArgs

    add_cli_args = EngineArgs.add_cli_args
    from_cli_args = EngineArgs.from_cli_args.__func__
    create_engine_config = EngineArgs.create_engine_config

    def add_with_cor(parser: Any) -> Any:
        return flags.add(add_cli_args(parser))

    def from_with_cor(cls: type, args: Any) -> Any:
        flags.merge(args)
        return from_cli_args(cls, args)

    @functools.wraps(create_engine_config)
    def create_with_cor(self: Any, *args: Any, **kwargs: Any) -> "VllmConfig":
        if "cor" not in (self.additional_config or {}):
            return create_engine_config(self, *args, **kwargs)
        if off:
            logger.warning("CoR: COR_DISABLE is set; serving with the model's own routing")
            self.additional_config = {k: v for k, v in self.additional_config.items() if k != "cor"}
            return create_engine_config(self, *args, **kwargs)
        config, scores = _resolve(self.additional_config["cor"])
        layers = plan(config, scores)
        self.additional_config = {**self.additional_config, "cor": _dump(config)}
        engine = create_engine_config(self, *args, **kwargs)
        fit.check(config, scores, engine)
        widen_capture(engine, layers)
        # Of several API servers, each of which comes here, the process that starts them speaks for all.
        if self._api_process_count == 1 or self._api_process_rank < 0:
            _log_start(config, scores, layers)
            for line in cpu.warnings(engine):
                logger.warning("CoR: %s", line)
        return engine

    EngineArgs.add_cli_args = staticmethod(add_with_cor)
    EngineArgs.from_cli_args = classmethod(from_with_cor)
    EngineArgs.create_engine_config = create_with_cor


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


def widen_capture(engine: "VllmConfig", layers: dict[int, LayerRouting]) -> None:
    """Make room for our widest layer in the buffer of --enable-return-routed-experts.

    It has the model's own top_k slots for every layer otherwise; CorRouter fills those that are left over.
    """
    if engine.aux_output_config.enable_return_routed_experts:
        widest = max(layer.top_k for layer in layers.values())
        engine.model_config.model_arch_config.num_experts_per_token = widest


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


def _wrap_factory() -> None:
    """Every MoE layer of vLLM is built by FusedMoEFactory: give it this layer's k_l and our router."""
    import vllm.model_executor.layers.fused_moe as package
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import layer as module

    original = module.FusedMoEFactory
    signature = inspect.signature(original)

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        config = config_of(get_current_vllm_config())
        if config is None:
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return _build_layer(original, bound, config)

    module.FusedMoEFactory = package.FusedMoEFactory = factory
    # Model modules are imported lazily, after this; one that was imported before holds the original.
    for name, loaded in list(sys.modules.items()):
        if name.startswith("vllm.") and vars(loaded).get("FusedMoEFactory") is original:
            loaded.FusedMoEFactory = factory  # type: ignore[attr-defined]


def _build_layer(original: Any, bound: inspect.BoundArguments, config: CorConfig) -> Any:
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe import layer as module
    from vllm.model_executor.models.utils import extract_layer_index

    from cor_vllm.serve.router import CorRouter

    engine = get_current_vllm_config()
    arguments = bound.arguments
    prefix = arguments["prefix"]
    _refuse_layer(prefix, arguments)
    routing = layers_of(config).get(extract_layer_index(prefix))
    if routing is None:
        raise RoutingError(f"{prefix}: a MoE layer that the scores file does not have; calibrate this model")
    arguments["top_k"] = routing.top_k
    create_router = module.create_fused_moe_router

    def create(**options: Any) -> CorRouter:
        return CorRouter(
            create_router(**options),
            routing,
            options,
            logits_dtype=arguments["router_logits_dtype"] or engine.model_config.dtype,
            widest=max(layer.top_k for layer in layers_of(config).values()),
            num_experts=arguments["num_experts"],
        )

    # The factory makes its router itself, with arguments worked out inside; wrapping that one call for the
    # time of this layer hands us all of them, the expert load balancer's state included.
    module.create_fused_moe_router = create
    try:
        runner = original(*bound.args, **bound.kwargs)
    finally:
        module.create_fused_moe_router = create_router
    _check_layer(prefix, runner)
    if routing.bias is not None:
        # A copy even on the CPU: it will be written to, and the plan is kept.
        bias = routing.bias.to(engine.device_config.device, copy=True)
        runner.register_buffer("cor_bias", bias, persistent=False)
        runner.router.bias = runner.cor_bias
    if config.observe:
        counts = torch.zeros(len(COUNTERS), dtype=torch.int64, device=engine.device_config.device)
        runner.register_buffer("cor_counts", counts, persistent=False)
        runner.router.counts = runner.cor_counts
    return runner


def _refuse_layer(prefix: str, arguments: dict[str, Any]) -> None:
    """Layers whose selection is more than scores and top-k, each by the name of what it does instead."""
    groups = _groups_refused(arguments)
    reasons = {
        "a router of its own": arguments["router"] is not None,
        "a custom routing function": arguments["custom_routing_function"] is not None,
        "hash routing": arguments["hash_indices_table"] is not None,
        "zero experts": arguments["zero_expert_type"] is not None,
        "a vision routing bias": arguments["bias_vl"] is not None,
        "fused shared experts": arguments["fuse_shared_experts"],
        "router weights on the input": arguments["apply_router_weight_on_input"],
        f"{arguments['scoring_func']} scoring": arguments["scoring_func"] not in ("softmax", "sigmoid"),
        groups: bool(groups),
        "simulated routing (VLLM_MOE_ROUTING_SIMULATION_STRATEGY)": bool(
            os.environ.get("VLLM_MOE_ROUTING_SIMULATION_STRATEGY")
        ),
    }
    for reason, present in reasons.items():
        if present:
            raise RoutingError(
                f"{prefix}: {reason}: not supported by counterfactual routing; start without it"
            )


def _groups_refused(arguments: dict[str, Any]) -> str:
    """Why these groups of experts are not ours; empty where they are, or where there are none."""
    groups, experts = arguments["num_expert_group"], arguments["num_experts"]
    if not arguments["use_grouped_topk"] or (groups, arguments["topk_group"]) in ((1, 1), (0, 0)):
        return ""
    if arguments["e_score_correction_bias"] is None:
        return "grouped top-k without a score correction bias"
    if experts % groups or experts < 2 * groups:
        return f"{experts} experts in {groups} groups"
    return ""


def _check_layer(name: str, runner: Any) -> None:
    from cor_vllm.serve.router import CorRouter

    if not isinstance(runner.router, CorRouter):
        raise RoutingError(f"{name}: routed by {type(runner.router).__name__}, not by counterfactual routing")
    if runner.is_monolithic:
        kernel = type(runner.routed_experts.quant_method).__name__
        raise RoutingError(
            f"{name}: the expert kernel of {kernel} routes inside itself and would ignore counterfactual "
            "routing: choose another --moe-backend"
        )
    if type(runner.routed_experts).__name__ == compat.SUBSTITUTED_EXPERTS:
        raise RoutingError(
            f"{name}: experts replaced by constants (MoNE): not supported by counterfactual routing; serve "
            "the model that was not pruned"
        )


def finish(model: torch.nn.Module, engine: "VllmConfig", layers: dict[int, LayerRouting]) -> None:
    """Check that every layer of the file is routed by us, and make each router ready to serve."""
    from vllm.model_executor.models.utils import extract_layer_index

    from cor_vllm.verify.probe import moe_layers

    found = set()
    for name, runner in moe_layers(model).items():
        _check_layer(name, runner)
        runner.router.weights_loaded()
        found.add(extract_layer_index(name))
    first, end = engine.model_config.get_layers_start_end_indices(engine.parallel_config)
    missing = sorted({layer for layer in layers if first <= layer < end} - found)
    if missing:
        raise RoutingError(
            f"decoder layers {missing}: the scores file has them, but {type(model).__name__} built no MoE "
            "layer there that counterfactual routing can reach"
        )
