"""What a condition does to a model of transformers: a context manager, which the condition carries.

A server can only route. The rest are the entropy gates and the paper's baselines. This file imports nothing
that loads a model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from cor_vllm.evaluate.benchmarks import Benchmark
from cor_vllm.scores import Scores

if TYPE_CHECKING:
    from cor_vllm.evaluate.routing import Call, Gates, RoutedCondition

Options = dict[str, Any] | None


class Model(Protocol):
    """What an act asks of a model; interventions.Interventions answers, and describes each name."""

    model: Any

    @property
    def gates(self) -> "Gates": ...

    def routed(
        self, scores: Scores | None, options: Options, thresholds: Sequence[float] | None = None
    ) -> "RoutedCondition": ...

    def gated_by_output(self, found: "RoutedCondition") -> "Call": ...

    def dola(self, benchmark: Benchmark, generates: bool) -> AbstractContextManager[None]: ...

    def iti_fold(self, fold: int) -> AbstractContextManager[None]: ...


Act = Callable[[Model, Any, Scores | None, Options], AbstractContextManager["RoutedCondition"]]
"""(model, harness.transformers_model over it, the condition's scores and options) → its routing meanwhile.

Options come with scores.
"""


@contextmanager
def routing(model: Model, lm: Any, scores: Scores | None, options: Options) -> "Iterator[RoutedCondition]":
    """The routing of the options, as a server has it."""
    found = model.routed(scores, options)
    with model.model.routing(found.rules):
        yield found


@contextmanager
def router_gate(
    model: Model, lm: Any, scores: Scores | None, options: Options
) -> "Iterator[RoutedCondition]":
    """That, with the bias only for tokens of which a layer's router is uncertain."""
    found = model.routed(scores, options, model.gates.router)
    with model.model.routing(found.rules):
        yield found


@contextmanager
def output_gate(
    model: Model, lm: Any, scores: Scores | None, options: Options
) -> "Iterator[RoutedCondition]":
    """That, only for tokens of which the model's output is uncertain."""
    found = model.routed(scores, options)
    lm.forward = model.gated_by_output(found)
    try:
        yield found
    finally:
        lm.forward = None


@contextmanager
def dola(model: Model, lm: Any, scores: Scores | None, options: Options) -> "Iterator[RoutedCondition]":
    """The routing of the options, and DoLa on top of it."""
    lm.around, lm.final = model.dola, True
    try:
        with routing(model, lm, scores, options) as found:
            yield found
    finally:
        lm.around, lm.final = None, False


@contextmanager
def iti(model: Model, lm: Any, scores: Scores | None, options: Options) -> "Iterator[RoutedCondition]":
    """The routing of the options, and ITI on top of it."""
    lm.folds = model.iti_fold
    try:
        with routing(model, lm, scores, options) as found:
            yield found
    finally:
        lm.folds = None


GATES: dict[Act, str] = {router_gate: "router", output_gate: "output"}  # what a run's settings call them
