"""From the harness's samples to one number per item: score, and for choices likelihood and margin."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cor_vllm.evaluate.benchmarks import Benchmark

Items = dict[str, dict[str, float]]
"""quantity → item → value. `score`: 0 to 1. `gold`: log-likelihood of the right answer, nats. `margin`: that
minus the mean over the wrong ones, which an answer that merely became more fluent does not raise."""


def read_items(
    benchmark: Benchmark, samples: dict[str, list[dict[str, Any]]], count_tokens: Callable[[str, str], int]
) -> Items:
    """One benchmark's values from what `lm_eval.simple_evaluate` logged.

    Args:
        benchmark: which metric and filter count.
        samples: task name → logged samples.
        count_tokens: (context, continuation) → tokens of the continuation, for FACTOR's means.
    """
    values: Items = {"score": {}}
    for task, rows in samples.items():
        for row in rows:
            if row["filter"] != benchmark.filter:
                continue
            item = f"{task}/{row['doc_id']}"
            values["score"][item] = float(row[benchmark.metric])
            likelihoods = _likelihoods(row)
            if likelihoods is None:
                continue
            if benchmark.task.startswith("factor_"):
                tokens = [count_tokens(context, text) for context, text in row["arguments"]]
                likelihoods = likelihoods / tokens
                values["score"][item] = float(likelihoods.argmax() == 0)
            for name, value in _gold_and_margin(likelihoods, _right_answers(task, row)).items():
                values.setdefault(name, {})[item] = value
    return values


def _likelihoods(row: dict[str, Any]) -> np.ndarray | None:
    """[choices] log-likelihoods, nats; None if the item is not a choice among answers."""
    responses = row["filtered_resps"]
    if len(responses) < 2 or not all(isinstance(r, Sequence) and len(r) == 2 for r in responses):
        return None
    return np.array([float(likelihood) for likelihood, _ in responses])


def _right_answers(task: str, row: dict[str, Any]) -> list[int]:
    if task == "truthfulqa_mc2":  # the one with several
        return [i for i, label in enumerate(row["doc"]["mc2_targets"]["labels"]) if label]
    return [int(row["target"])]


def _gold_and_margin(likelihoods: np.ndarray, right: list[int]) -> dict[str, float]:
    is_right = np.isin(np.arange(len(likelihoods)), right)
    if is_right.all() or not is_right.any():
        return {}
    gold = likelihoods[is_right].mean()
    return {"gold": float(gold), "margin": float(gold - likelihoods[~is_right].mean())}


def chance(benchmark: Benchmark, samples: dict[str, list[dict[str, Any]]]) -> float | None:
    """The mean score of guessing, 0 to 1; None if the benchmark is not a choice among answers."""
    shares = []
    for task, rows in samples.items():
        for row in rows:
            likelihoods = _likelihoods(row) if row["filter"] == benchmark.filter else None
            if likelihoods is not None:
                shares.append(len(_right_answers(task, row)) / len(likelihoods))
    return sum(shares) / len(shares) if shares else None
