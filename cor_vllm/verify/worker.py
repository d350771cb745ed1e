"""What every vLLM worker does for us: checks its own routing before it serves, and reports it when asked."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from cor_vllm.serve.config import CorConfig
from cor_vllm.serve.fit import format_of
from cor_vllm.serve.layers import RoutingError, finish
from cor_vllm.serve.objects import Worker
from cor_vllm.serve.overlaid import switch_of, weights_arrived
from cor_vllm.serve.process import config_of, layers_of, overlay_of, scores_of
from cor_vllm.verify.gate_judge import judge_gate
from cor_vllm.verify.judge import as_rows, fault_of, first_problem, judge
from cor_vllm.verify.loaded import check_loaded

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def init(original: Callable[..., None]) -> Callable[..., None]:
    """WorkerBase.__init__, after which the worker checks its own routing whenever it has got weights."""

    @functools.wraps(original)
    def init_with_cor(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = config_of(self.vllm_config)
        if config is None:
            return
        # On the instance: each platform's worker has methods of its own, and its class is not imported here,
        # since the CPU's must patch torch before vLLM's workers see it.
        for name in ("load_model", "reload_weights", "finish_weight_update"):
            if hasattr(self, name):
                first = name == "load_model"
                setattr(self, name, _then_finish(self, getattr(self, name), config, first))
        self.determine_available_memory = functools.partial(
            _checked_start, self, self.determine_available_memory
        )

    return init_with_cor


def give_methods() -> None:
    """Give vLLM's workers the methods that `cor-vllm verify` calls by collective_rpc."""
    from vllm.v1.worker.worker_base import WorkerBase

    WorkerBase.cor_probe_begin = _probe_begin
    WorkerBase.cor_probe_end = _probe_end


def _then_finish(
    worker: Worker, get_weights: Callable[..., None], config: CorConfig, first: bool
) -> Callable[..., None]:
    """Whenever the worker has got weights, every MoE layer must still be ours, and each router reads them.

    Expert kernels are chosen until the weights are there, and LoRA wraps the experts after that; a router's
    buffer holds the model's own correction bias, which a reload (vLLM's own, or a trainer's) replaces. The
    first weights are compared with the files before the router of a router file takes the place of one.
    """

    @functools.wraps(get_weights)
    def get_weights_with_cor(*args: Any, **kwargs: Any) -> None:
        get_weights(*args, **kwargs)
        if config.scores is not None:
            finish(worker.get_model(), worker.vllm_config, layers_of(config))
        with torch.inference_mode():
            if first:
                check_loaded(worker.get_model(), worker.vllm_config)
            weights_arrived(worker, config)

    return get_weights_with_cor


@torch.inference_mode()
def _checked_start(worker: Worker, determine_available_memory: Any) -> Any:
    """Watch the run by which vLLM measures its memory: every MoE layer must be routed as the file says.

    Its tokens are dummies, all the same, which say nothing about the routers; those are asked by themselves.
    Without a scores file the layers are vLLM's own, and there is nothing to watch.
    """
    from cor_vllm.verify import probe

    model = worker.get_model()
    for name, logits in probe.ask_gates(model).items():
        if fault := fault_of(logits, different_tokens=_has_weights(worker)):
            raise RoutingError(
                f"{name}: {fault}; compare the checkpoint with the model's own, or load it anew"
            )
    if _config(worker).scores is None:
        return determine_available_memory()
    records: list[Any] = []
    with contextlib.ExitStack() as stack:
        if _runs_in_python(worker.vllm_config):
            records = stack.enter_context(probe.recording(model, different_tokens=False))
        result = determine_available_memory()
    if all(record.router_logits is None for record in records):  # vLLM saw no need to run the model
        records = probe.ask_routers(model)
    problem = first_problem(_judge(worker, records))
    if problem:
        raise RoutingError(f"{problem}; `cor-vllm verify` reports on every layer")
    return result


def _runs_in_python(vllm_config: "VllmConfig") -> bool:
    """A model that is compiled for the CPU contains its routing; on a GPU the MoE layer is an opaque op."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    return not current_platform.is_cpu() or vllm_config.compilation_config.mode == CompilationMode.NONE


def _has_weights(worker: Worker) -> bool:
    """Whether the routers are a model's: among dummy weights a bias can outweigh the token."""
    return format_of(worker.vllm_config) != "dummy"


def _config(worker: Worker) -> CorConfig:
    config = config_of(worker.vllm_config)
    assert config is not None, "only called if counterfactual routing is configured"
    return config


def _judge(worker: Worker, records: list[Any]) -> Any:
    config = _config(worker)
    return judge(records, config, scores_of(config), worker.rank)


def _probe_begin(self: Any) -> None:
    """Record the next forward."""
    from cor_vllm.verify import probe

    overlay, switch = overlay_of(_config(self)), switch_of(self)
    self.cor_probe = contextlib.ExitStack()
    recording = probe.recording(
        self.get_model(),
        different_tokens=_has_weights(self),
        gate_of=overlay.layer if overlay and switch else None,
    )
    self.cor_records = self.cor_probe.enter_context(recording)


def _probe_end(self: Any) -> dict[str, Any]:
    """What was found since `_probe_begin`, as dictionaries.

    Returns:
        "layers": judge.LayerVerdict by layer, without a scores file none. "router": gate_judge.GateVerdict of
        the layer that a router file replaces the router of; None if this worker does not have it.
    """
    self.cor_probe.close()
    config, records = _config(self), self.cor_records
    found = []
    if (overlay := overlay_of(config)) is not None:
        asked = [record for record in records if record.layer_index == overlay.layer]
        alone = config.scores is None
        found = [dataclasses.asdict(judge_gate(record, overlay, alone, self.rank)) for record in asked]
    return {
        "layers": as_rows(_judge(self, records)) if config.scores is not None else [],
        "router": found[0] if found else None,
    }
