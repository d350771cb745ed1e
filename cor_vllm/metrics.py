"""Prometheus metrics of the routing, beside vLLM's own on /metrics; their names are the project's contract.

They live in the API server's process, the only one that vLLM exposes.
"""

from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from cor_vllm.observe import COUNTERS
from cor_vllm.state import State

_HELP = {
    "slots": "Expert slots filled (tokens processed times k of the layer).",
    "slots_changed": "Expert slots that the model's own score with the same k would have filled otherwise.",
    "distinct_experts": "Distinct experts of a forward, added up over forwards.",
    "router_steps": "Forwards of the router, those without any token left out.",
}


class Metrics:
    """The metrics of one server.

    Args:
        state: what the workers say at the start.
        registry: where to register; tests give their own.
    """

    def __init__(self, state: State, registry: CollectorRegistry = REGISTRY) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            # Of several API servers, the one that changed something last is right.
            return Gauge(name, text, labels, registry=registry, multiprocess_mode="mostrecent")

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        info_labels = ("mode", "weights", "scores_sha256", "fingerprint", "version")
        self._info = gauge("cor_info", "1 for the routing that is served, 0 for one before it.", *info_labels)
        self._lambda = gauge("cor_lambda", "Weight of the causal score, 0 where there is none.", "layer")
        self._top_k = gauge("cor_top_k", "Experts per token.", "layer")
        self._model_top_k = gauge("cor_model_top_k", "Experts per token of the untouched model.")
        self._budget = gauge("cor_budget", "Experts per token, all MoE layers together.")
        self._model_budget = gauge("cor_model_budget", "cor_budget of the untouched model.")
        self._hooked = gauge("cor_hooked_layers", "MoE layers that a worker routes.", "worker")
        self._activations = counter("cor_expert_activations", "Tokens processed times cor_budget.")
        # Without --cor-observe nothing counts these, and a zero would be a lie.
        self._counters = [counter(f"cor_{name}", _HELP[name], "layer") for name in COUNTERS if state.observe]
        self._counted: dict[int, list[int]] = {}
        self._shown: tuple[str, ...] | None = None
        self.publish(state)

    def publish(self, state: State) -> None:
        """Set the gauges to `state`."""
        labels = (state.mode, state.weights, state.scores_sha256, state.fingerprint, state.version)
        if self._shown not in (None, labels):
            self._info.labels(*self._shown).set(0)  # a series cannot be removed where servers share files
        self._info.labels(*labels).set(1)
        self._shown = labels
        for layer in state.layers:
            self._lambda.labels(layer.layer).set(layer.lambda_)
            self._top_k.labels(layer.layer).set(layer.k)
        self._model_top_k.set(state.model_top_k)
        self._budget.set(state.budget)
        self._model_budget.set(state.model_budget)
        for number, worker in enumerate(state.workers):
            self._hooked.labels(number).set(worker.hooked_layers)

    def processed(self, tokens: int, budget: int) -> None:
        """Count tokens that went through the model."""
        self._activations.inc(tokens * budget)

    def count(self, engines: list[dict[int, list[int]]]) -> None:
        """Bring the counters up to what the devices have counted since the first call (COUNTERS by layer).

        The first call is the start: what the engine counted before was its own warming up.
        """
        total: dict[int, list[int]] = {}
        for layers in engines:
            for layer, values in layers.items():
                before = total.get(layer, [0] * len(COUNTERS))
                total[layer] = [a + b for a, b in zip(before, values, strict=True)]
        for layer, values in total.items():
            since = self._counted.get(layer, values)
            for counter, now, then in zip(self._counters, values, since, strict=True):
                counter.labels(layer).inc(max(0, now - then))
        self._counted.update(total)


class Activations(AggregateStatLoggerBase):
    """Adds each iteration's tokens to cor_expert_activations_total; one of vLLM's stat loggers."""

    def __init__(self, metrics: Metrics, budget: int) -> None:
        self._metrics = metrics
        self._budget = budget  # Σ k_l, fixed while the server runs

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """A prompt's first new token costs no forward of its own; every other one does."""
        if iteration_stats is None:
            return
        tokens = (
            iteration_stats.prompt_token_stats.computed
            + iteration_stats.num_generation_tokens
            - len(iteration_stats.time_to_first_tokens_iter)
        )
        self._metrics.processed(max(0, tokens), self._budget)

    def log_engine_initialized(self) -> None:
        """Nothing to log."""
