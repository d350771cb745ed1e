"""Reads and changes the routing where it lives: methods that vLLM's workers and engine cores get from us.

The front ends call the engine cores' methods (endpoint.py), which run between two steps of the model, and
those call their workers'. What they exchange is plain data, because vLLM sends no other.
"""

from typing import Any

from cor_vllm.live.prefix_cache import current, renew_salt, salt_of
from cor_vllm.modes import has_lambda
from cor_vllm.overlay import RouterOverlay
from cor_vllm.scores import ScoresError
from cor_vllm.serve.config import ConfigError, CorConfig
from cor_vllm.serve.layers import kernel_name, moe_layers
from cor_vllm.serve.objects import EngineCore, Worker
from cor_vllm.serve.overlaid import switch_of
from cor_vllm.serve.process import doubts_of, layers_of, overlay_of, scores_of
from cor_vllm.version import __version__


def give_methods() -> None:
    """Give vLLM's workers and engine cores our methods."""
    from vllm.v1.engine import core
    from vllm.v1.worker.worker_base import WorkerBase

    WorkerBase.cor_status = worker_status
    WorkerBase.cor_counts = worker_counts
    WorkerBase.cor_check = worker_check
    WorkerBase.cor_apply = worker_apply
    core.EngineCore.cor_status = core_status
    core.EngineCore.cor_counts = core_counts
    core.EngineCore.cor_check = core_check
    core.EngineCore.cor_change = core_change


# ---- worker


def _moe_layers(worker: Worker) -> list[tuple[int, str, Any]]:
    """Decoder layer number, name and runner of every MoE layer that this worker holds."""
    from vllm.model_executor.models.utils import extract_layer_index

    found = moe_layers(worker.get_model())
    return [(extract_layer_index(name), name, runner) for name, runner in found.items()]


def worker_status(worker: Worker) -> dict[str, Any]:
    """What this worker routes by, read off its layers; nothing is read from the device."""
    config = current(worker)
    assert config is not None, "asked only if the engine is ours"
    overlay, model = overlay_of(config), None
    if config.scores is not None:
        file = scores_of(config).config
        if has_lambda(config.mode):  # a change of the mode may be what first makes the file's λ count
            config = config.resolved(file.serving)
        model = file.model
    of = model or (overlay and overlay.config.model)
    return {
        "rank": worker.rank,
        "version": __version__,
        "fingerprint": of.fingerprint if of else None,
        "model_top_k": model.top_k if model else None,
        "options": config.model_dump(by_alias=True, exclude={"scores", "router"}),
        "warnings": list(doubts_of(config)),
        "layers": _layers_status(worker) if model else [],
        "router": _router_status(worker, config, overlay),
    }


def _layers_status(worker: Worker) -> list[dict[str, Any]]:
    return [
        {
            "layer": index,
            "name": name,
            "router": type(runner.router).__name__,
            "kernel": kernel_name(runner),
            "k": runner.router.top_k,
            "lambda": runner.router.layer.lambda_,
            "biased": runner.router.layer.biased,
        }
        for index, name, runner in _moe_layers(worker)
    ]


def _router_status(worker: Worker, config: CorConfig, overlay: RouterOverlay | None) -> dict[str, Any] | None:
    """Of the router that a router file replaces; None if this worker does not have its layer."""
    switch = switch_of(worker)
    if overlay is None or switch is None:
        return None
    harm = overlay.config.harm()
    return {
        "sha256": config.router_sha256,
        "fingerprint": overlay.fingerprint,
        "layer": overlay.layer,
        "on": switch.in_force,
        "drift": overlay.config.drift,
        "objective": overlay.config.training.objective,
        "warnings": [harm] if harm else [],
    }


def worker_counts(worker: Worker) -> dict[int, list[int]]:
    """Decoder layer number → observe.COUNTERS since the start; waits for the device."""
    counts = ((index, runner.router.counts) for index, _, runner in _moe_layers(worker))
    return {index: values.tolist() for index, values in counts if values is not None}


def worker_check(worker: Worker, config: CorConfig) -> str:
    """Why this worker cannot route by `config` without a restart; empty if it can."""
    switch = switch_of(worker)
    if switch is not None and switch.lost:
        return (
            "new weights have come for the router that the router file replaces: restart the server without "
            "--cor-router, or with a file that was made for them"
        )
    if config.scores is None:
        return ""
    try:
        layers = layers_of(config)
    except (ConfigError, ScoresError) as error:
        return str(error)
    differ = [index for index, _, m in _moe_layers(worker) if layers[index].top_k != m.router.top_k]
    if not differ:
        return ""
    return (
        f"mode {config.mode!r} has another k in decoder layers {differ}, and k is part of captured and "
        f"compiled graphs: restart the server with --cor-mode {config.mode}"
    )


def worker_apply(worker: Worker, config: CorConfig) -> None:
    """Route by `config`, which worker_check accepted, from the next forward on."""
    if config.scores is not None:
        layers = layers_of(config)
        for index, _, runner in _moe_layers(worker):
            runner.router.change(layers[index])
    if (switch := switch_of(worker)) is not None:
        switch.turn(config.router_on)
    worker.cor_config = config


# ---- engine core


def core_status(core: EngineCore) -> list[dict[str, Any]]:
    """worker_status of every worker of this engine, by rank."""
    statuses: list[dict[str, Any]] = core.collective_rpc("cor_status")
    return statuses


def core_counts(core: EngineCore) -> dict[int, list[int]]:
    """worker_counts of this engine; empty while it sleeps, since its memory is not there then.

    Ranks that share a layer see the same tokens, so that the first one's counts are the layer's.
    """
    merged: dict[int, list[int]] = {}
    if not core.model_executor.is_sleeping:
        for counts in core.collective_rpc("cor_counts"):
            merged = {**counts, **merged}
    return merged


def core_check(core: EngineCore, lambda_: float | None, mode: str | None, router: bool | None = None) -> str:
    """Why this engine cannot change so; empty if it can.

    Args:
        lambda_: λ of all layers; None, here and below: it stays as it is.
        mode: a name of MODES.
        router: whether the router of the router file is in force.
    """
    if core.model_executor.is_sleeping:
        return "the engine sleeps and its buffers are not in memory: wake it up first"
    config = current(core)
    assert config is not None, "asked only if the engine is ours"
    try:
        changed = config.changed(lambda_, mode, router)
    except ConfigError as error:
        return str(error)
    if core.vllm_config.kv_transfer_config is not None and salt_of(changed) != salt_of(config):
        return (
            "a KV connector is configured, and what it keeps or brings was computed under another routing: "
            "restart the server to change the routing"
        )
    answers: list[str] = core.collective_rpc("cor_check", args=(changed,))
    return next(filter(None, answers), "")


def core_change(core: EngineCore, lambda_: float | None, mode: str | None, router: bool | None = None) -> str:
    """Change it between two steps: on all workers, or, with the reason returned, on none; as core_check.

    If the change reaches what is in the KV cache, requests that are running keep the tokens that they have
    and are computed again under the new routing, as vLLM does when weights change: no KV cache is left that
    mixes two routings.
    """
    if refused := core_check(core, lambda_, mode, router):
        return refused
    config = current(core)
    assert config is not None, "core_check said so"
    changed = config.changed(lambda_, mode, router)
    if changed == config:
        return ""
    core.collective_rpc("cor_apply", args=(changed,))
    core.cor_config = changed
    if salt_of(changed) != salt_of(config):
        core.reset_prefix_cache(reset_running_requests=True)
        for request in core.scheduler.requests.values():
            renew_salt(core, request)
    return ""
