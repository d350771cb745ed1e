"""A transformers model as the acts of conditions (acts.py) need it: rules, gates, DoLa and ITI."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from cor_vllm.calibrate.config import DEFAULT_CORPUS
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.text.corpus import draw, load_corpus
from cor_vllm.evaluate.benchmarks import BENCHMARKS, Benchmark, load_task
from cor_vllm.evaluate.conditions import Condition, Sources
from cor_vllm.evaluate.dola import candidate_layers, dola
from cor_vllm.evaluate.iti import Directions, fit, iti
from cor_vllm.evaluate.routing import Call, Gates, RoutedCondition, gated_by_output, gates, routed
from cor_vllm.scores import Scores

GATE_TOKENS, GATE_SEQUENCE = 2000, 256  # of the shipped corpus, for the thresholds
DOLA_LOW = ("factor_news", "factor_wiki", "gsm8k")
FOLDS = 2  # ITI's directions for an item come from the questions of the other fold


class Interventions:
    """What every condition needs of one loaded model, made when it is first asked for.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        data: as for `load_task`; ITI is fitted on TruthfulQA.
        seed: of draws.
    """

    def __init__(self, model: MoeModel, tokenizer: Any, data: Path | None, seed: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.data = data
        self.seed = seed

    def applied(
        self, condition: Condition, sources: Sources, lm: Any
    ) -> AbstractContextManager[RoutedCondition]:
        """Put a condition on the model, and on the harness's view of it, for as long as the context lasts.

        Its router is the model's own or not: routing.replaced_router.

        Args:
            condition: which.
            sources: where its scores are.
            lm: harness.transformers_model over the same model.
        """
        scores = sources.get(condition.source)
        if condition.change is not None and scores is not None:
            scores = condition.change(scores)
        return condition.act(self, lm, scores, condition.options)

    def routed(
        self, scores: Scores | None, options: dict[str, Any] | None, thresholds: Sequence[float] | None = None
    ) -> RoutedCondition:
        """The rules of a condition; the arguments are those of routing.routed."""
        return routed(self.model, scores, options, thresholds)

    def gated_by_output(self, found: RoutedCondition) -> Call:
        """A forward that follows the rules only for tokens of which the model's own output is uncertain."""
        return gated_by_output(
            self.model, found.rules, self.gates.output, lambda ids: self.model.model(ids).logits
        )

    @cached_property
    def gates(self) -> Gates:
        """Entropy thresholds on the shipped corpus."""

        def tokenize(text: str) -> list[int]:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
            return ids

        corpus = load_corpus(DEFAULT_CORPUS)
        (sequences,) = draw(corpus, tokenize, [], GATE_SEQUENCE, [GATE_TOKENS], self.seed)
        return gates(self.model, sequences)

    def dola(self, benchmark: Benchmark, generates: bool) -> AbstractContextManager[None]:
        """DoLa with its authors' settings for this kind of benchmark (dola.py has their sources).

        Long texts contrast the lower half of the layers, short answers the upper. Choices among short answers
        add up the plain contrast, without the plausibility constraint, of which one token would decide.
        """
        long = benchmark.task in DOLA_LOW
        layers = candidate_layers(self.model.model.config, "low" if long else "high")
        if long or generates:
            return dola(self.model.model, layers)
        return dola(self.model.model, layers, relative_top=0.0, post_softmax=False)

    def iti_fold(self, fold: int) -> AbstractContextManager[None]:
        """ITI for the items of a fold (item number modulo FOLDS), fitted on the others."""
        return iti(self.model.model, self._directions[fold])

    @cached_property
    def _directions(self) -> list[Directions]:
        (task,) = load_task(BENCHMARKS["truthfulqa_mc2"], self.data).values()
        examples: list[list[tuple[list[int], int, int]]] = [[] for _ in range(FOLDS)]
        for number, doc in enumerate(task.eval_docs):
            targets = doc["mc2_targets"]
            for answer, label in zip(targets["choices"], targets["labels"], strict=True):
                # Without the harness's six examples, as ITI's authors have it (utils.py, format_truthfulqa).
                text = f"Q: {doc['question']} A: {answer}"
                ids = self.tokenizer(text, add_special_tokens=False).input_ids
                examples[number % FOLDS].append((ids, label, number))
        return [fit(self.model.model, others) for others in reversed(examples)]
