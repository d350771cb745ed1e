"""Prometheus metrics of the routing, next to vLLM's own on /metrics; their names are the project's contract.

They live in the API server's process, the only one that vLLM exposes.
"""

import os
from typing import Any
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from cor_vllm.live.state import State
from cor_vllm.serve.observe import COUNTERS

_HELP = {
    "slots": "Expert slots filled (tokens processed times k of the layer).",
    "slots_changed": "Expert slots that the model's own score with the same k would have filled otherwise.",
    "distinct_experts": "Distinct experts of a forward, added up over forwards.",
    "router_steps": "Forwards of the router, those without any token left out.",
}


_registered: WeakKeyDictionary[CollectorRegistry, list[Gauge | Counter]] = WeakKeyDictionary()


class Metrics:
    """The metrics of one server; of several in one process, the newest one's, as vLLM does with its own.

    Args:
        state: what the workers say at the start.
        registry: where to register; tests give their own.
    """

    def __init__(self, state: State, registry: CollectorRegistry = REGISTRY) -> None:
        for earlier in _registered.pop(registry, []):
            registry.unregister(earlier)
        registered = _registered[registry] = []
        self._gauges: dict[str, tuple[Gauge, tuple[str, ...]]] = {}

        def gauge(name: str, text: str, *labels: str) -> None:
            # Of several API servers, the one that changed something last is right.
            made = Gauge(name, text, labels, registry=registry, multiprocess_mode="mostrecent")
            self._gauges[name] = made, labels
            registered.append(made)

        def counter(name: str, text: str, *labels: str) -> Counter:
            made = Counter(name, text, labels, registry=registry)
            registered.append(made)
            return made

        info_labels = ("mode", "weights", "scores_sha256", "fingerprint", "version")
        gauge("cor_info", "1 for the routing that is served, 0 for one before it.", *info_labels)
        gauge("cor_hooked_layers", "MoE layers that a worker routes.", "worker")
        # Each only with its file: without one a zero would be a lie.
        if state.scores_sha256 is not None:
            gauge("cor_lambda", "Weight of CEI, 0 in a layer without one.", "layer")
            gauge("cor_top_k", "Experts per token.", "layer")
            gauge("cor_model_top_k", "Experts per token of the untouched model.")
            gauge("cor_budget", "Experts per token, all MoE layers together.")
            gauge("cor_model_budget", "cor_budget of the untouched model.")
            self._activations = counter("cor_expert_activations", "Tokens processed times cor_budget.")
        if state.router is not None:
            gauge(
                "cor_router_on",
                "1 while the router of the router file is in force.",
                "layer",
                "router_sha256",
            )
        # Without --cor-observe nothing counts these, and a zero would be a lie.
        self._counters = [counter(f"cor_{name}", _HELP[name], "layer") for name in COUNTERS if state.observe]
        self._counted: dict[int, list[int]] = {}
        self.publish(state)

    def publish(self, state: State) -> None:
        """Set the gauges to `state`, and every series of theirs that it does not have to 0."""
        files = (state.mode or "", state.weights or "", state.scores_sha256 or "")
        now: dict[str, dict[tuple[str, ...], float]] = {
            "cor_info": {(*files, state.fingerprint, state.version): 1},
            "cor_lambda": {(str(layer.layer),): layer.lambda_ for layer in state.layers},
            "cor_top_k": {(str(layer.layer),): layer.k for layer in state.layers},
            "cor_model_top_k": {(): state.model_top_k or 0},
            "cor_budget": {(): state.budget or 0},
            "cor_model_budget": {(): state.model_budget or 0},
            "cor_hooked_layers": {(str(n),): w.hooked_layers for n, w in enumerate(state.workers)},
        }
        if (router := state.router) is not None:
            now["cor_router_on"] = {(str(router.layer), router.sha256): router.on}
        for name, shown in self._shown().items():
            gauge, labels = self._gauges[name]
            # A series cannot be removed if servers share files, those of earlier servers included.
            for series in shown | now[name].keys():
                (gauge.labels(*series) if labels else gauge).set(now[name].get(series, 0))

    def _shown(self) -> dict[str, set[tuple[str, ...]]]:
        """The label values of every series that /metrics shows of each gauge."""
        families = [family for gauge, _ in self._gauges.values() for family in gauge.collect()]
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # vLLM then shows what the files of all processes hold
            families += MultiProcessCollector(CollectorRegistry()).collect()
        shown: dict[str, set[tuple[str, ...]]] = {name: set() for name in self._gauges}
        for family in families:
            if family.name in shown:
                _, labels = self._gauges[family.name]
                shown[family.name] |= {
                    tuple(sample.labels[label] for label in labels)
                    for sample in family.samples
                    if set(labels) <= set(sample.labels)  # another version may have had others
                }
        return shown

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
