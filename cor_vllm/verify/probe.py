"""What really happens in the MoE layers of this process: recorded while the model runs, for judge.py."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.utils import extract_layer_index

from cor_vllm.kernels.dispatch import route
from cor_vllm.kernels.scoring import Scoring
from cor_vllm.serve.layers import gates, kernel_name, moe_layers
from cor_vllm.serve.router import CorRouter

ROWS = 256  # tokens that are kept per layer
SYNTHETIC_ROWS = 16


@dataclasses.dataclass
class LayerRecord:
    """One MoE layer of one worker: what it is built of, and what went through it.

    `router_logits` is what the router was given, `topk_ids` and `topk_weights` what the expert kernel was
    given, for the first ROWS tokens; None if that was never called.
    """

    name: str
    layer_index: int
    kernel: str
    modular: bool
    router: str
    top_k: int
    scoring: Scoring  # with the correction bias on the CPU
    decided_by_vllm: bool = False  # the score is the model's own, so vLLM's router selects and weighs
    different_tokens: bool = False  # the rows are of different tokens, as no run with dummy tokens has them
    router_logits: torch.Tensor | None = None  # [T, N], in the dtype that the model computes them in
    topk_ids: torch.Tensor | None = None  # [T, top_k]
    topk_weights: torch.Tensor | None = None  # [T, top_k] float32
    stock_ids: torch.Tensor | None = None  # [T, top_k] what vLLM's own router makes of the same logits
    stock_weights: torch.Tensor | None = None  # [T, top_k] float32, their weights
    exact_ids: torch.Tensor | None = None  # [T, top_k] what it makes of them when they come in float32
    exact_weights: torch.Tensor | None = None  # [T, top_k] float32, their weights
    unbiased_ids: torch.Tensor | None = None  # [T, top_k] what our routing step makes of them with λ = 0
    # Of the layer whose router a router file replaces:
    gate_input: torch.Tensor | None = None  # [T, H], what the linear layer that makes the logits was given
    gate_output: torch.Tensor | None = None  # [T, N], what it made of it
    gate_bias: torch.Tensor | None = None  # [N]


def describe(name: str, runner: MoERunner) -> LayerRecord:
    """The facts about a layer that hold without running it."""
    record = LayerRecord(
        name=name,
        layer_index=extract_layer_index(name),
        kernel=kernel_name(runner),
        modular=not runner.is_monolithic,
        router=type(runner.router).__name__,
        top_k=runner.router.top_k,
        scoring=_scoring(runner.router),
    )
    if isinstance(runner.router, CorRouter):
        record.decided_by_vllm = runner.router.decided_by_vllm
    return record


def _scoring(router: Any) -> Scoring:
    if not isinstance(router, CorRouter):
        return _scoring_of_vllm(router)
    own = router.scoring.total_bias()
    own = None if own is None else own.detach().to("cpu", copy=True)
    return dataclasses.replace(router.scoring, correction_bias=own)


def _scoring_of_vllm(router: Any) -> Scoring:
    """How vLLM's own router of a layer selects; how it weighs is not looked at.

    If a scores file is served, that the router is not ours is a problem of its own, which the judge names.
    """
    known = vars(router)
    groups = known.get("num_expert_group") if known.get("use_grouped_topk", True) else None
    own = known.get("e_score_correction_bias")
    return Scoring(
        known.get("scoring_func", "softmax"),
        renormalize=False,
        num_expert_group=groups or 1,
        topk_group=known["topk_group"] if groups else 1,
        correction_bias=None if own is None else own.detach().to("cpu", copy=True),
    )


@contextlib.contextmanager
def recording(
    model: torch.nn.Module, different_tokens: bool, gate_of: int | None = None
) -> Iterator[list[LayerRecord]]:
    """Record what passes through the MoE layers in the first forward of the with-block.

    The layers must run in Python: not inside a CUDA graph replay or a graph compiled for the CPU.

    Args:
        model: of one worker.
        different_tokens: the forward will be of different tokens, so that the logits have to differ, too.
        gate_of: the decoder layer whose linear layer that makes the logits is recorded, too.
    """
    layers = moe_layers(model)
    records = [describe(name, runner) for name, runner in layers.items()]
    for record in records:
        record.different_tokens = different_tokens
    with contextlib.ExitStack() as stack:
        for record, runner in zip(records, layers.values(), strict=True):
            stack.enter_context(_replaced(runner.router, "select_experts", _listen_to_router(record)))
            if runner.router.eplb_state is not None:
                # The kernel gets the ids of physical experts then.
                stack.enter_context(
                    _replaced(runner.router, "_apply_eplb_mapping", _listen_to_mapping(record))
                )
            experts = runner.routed_experts
            stack.enter_context(_replaced(experts, "forward_modular", _listen_to_kernel(record)))
            if record.layer_index == gate_of:
                hook = gates(model)[record.name].register_forward_hook(_listen_to_gate(record))
                stack.callback(hook.remove)
        yield records
    for record, runner in zip(records, layers.values(), strict=True):
        _add_stock(record, runner.router)


def ask_routers(model: torch.nn.Module) -> list[LayerRecord]:
    """Records of the routers alone, on random logits, where the model cannot be run in Python."""
    records = []
    for name, runner in moe_layers(model).items():
        record = describe(name, runner)
        bias = runner.router.layer.bias if isinstance(runner.router, CorRouter) else None
        experts = runner.router.global_num_experts if bias is None else len(bias)
        device = next(runner.parameters()).device
        dtype = getattr(runner.router, "logits_dtype", torch.float32)
        generator = torch.Generator().manual_seed(record.layer_index)
        drawn = torch.randn(SYNTHETIC_ROWS, experts, generator=generator, dtype=torch.float32)
        logits = (2 * drawn).to(device, dtype)
        weights, ids = runner.router._compute_routing(logits, logits, None)
        record.router_logits, record.topk_weights, record.topk_ids = map(_host, (logits, weights, ids))
        _add_stock(record, runner.router)
        records.append(record)
    return records


def ask_gates(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Router logits [SYNTHETIC_ROWS, N] of random activations, by the MoE layer's name.

    vLLM packs a gate's weight for some kernels and drops it, so gates are asked and not looked at.
    """
    answers = {}
    for name, gate in gates(model).items():
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(SYNTHETIC_ROWS, gate.input_size, generator=generator, dtype=torch.float32)
        logits = gate(drawn.to(next(gate.parameters()).device, gate.params_dtype))
        logits = logits[0] if isinstance(logits, tuple) else logits
        answers[name] = logits.detach().cpu()
    return answers


@contextlib.contextmanager
def _replaced(owner: Any, name: str, wrap: Any) -> Iterator[None]:
    setattr(owner, name, wrap(getattr(owner, name)))  # on the instance: the class keeps its own
    try:
        yield
    finally:
        delattr(owner, name)


def _listen_to_gate(record: LayerRecord) -> Any:
    def listening(gate: Any, given: tuple[Any, ...], made: Any) -> None:
        if record.gate_input is None:
            record.gate_input = _host(given[0])
            record.gate_output = _host(made[0] if isinstance(made, tuple) else made)
            record.gate_bias = _host(getattr(gate, "bias", None))

    return listening


def _listen_to_router(record: LayerRecord) -> Any:
    def wrap(select_experts: Any) -> Any:
        def listening(*args: Any, **kwargs: Any) -> Any:
            logits = kwargs["router_logits"] if "router_logits" in kwargs else args[1]
            if record.router_logits is None:
                record.router_logits = _host(logits)
            return select_experts(*args, **kwargs)

        return listening

    return wrap


def _listen_to_mapping(record: LayerRecord) -> Any:
    def wrap(apply_eplb_mapping: Any) -> Any:
        def listening(topk_ids: torch.Tensor) -> Any:
            if record.topk_ids is None:
                record.topk_ids = _host(topk_ids)
            return apply_eplb_mapping(topk_ids)

        return listening

    return wrap


def _listen_to_kernel(record: LayerRecord) -> Any:
    def wrap(forward_modular: Any) -> Any:
        def listening(*args: Any, **kwargs: Any) -> Any:
            if record.topk_ids is None:
                record.topk_ids = _host(kwargs["topk_ids"])
            if record.topk_weights is None:
                record.topk_weights = _host(kwargs["topk_weights"])
            return forward_modular(*args, **kwargs)

        return listening

    return wrap


def _add_stock(record: LayerRecord, router: Any) -> None:
    """The same logits through vLLM's own router and through our routing step with λ = 0.

    vLLM's router for CPUs computes in the logits' dtype, up to 2⁻⁹ (bf16) off in each weight. So it is asked
    twice: as it serves, and in float32, where what it computes can be told from how it rounds.
    """
    if record.router_logits is None or not isinstance(router, CorRouter):
        return
    device = router.bias.device if router.bias is not None else torch.device("cpu")
    logits = record.router_logits.to(device)
    stock_weights, stock_ids = router.stock._compute_routing(logits, logits, None)
    exact_weights, exact_ids = router.stock._compute_routing(logits.float(), logits.float(), None)
    zeros = torch.zeros(logits.shape[1], device=device, dtype=torch.float32)
    _, unbiased = route(logits, router.scoring.total_bias(zeros, device), record.top_k, router.scoring)
    record.stock_ids, record.stock_weights = _host(stock_ids), _host(stock_weights)
    record.exact_ids, record.exact_weights = _host(exact_ids), _host(exact_weights)
    record.unbiased_ids = _host(unbiased)


def _host(values: torch.Tensor | None) -> torch.Tensor | None:
    return None if values is None else values.detach()[:ROWS].clone().cpu()
