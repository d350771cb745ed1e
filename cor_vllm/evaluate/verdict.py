"""What a reader must know before the numbers: benchmarks that cannot tell, cut prompts, chat models."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.evaluate.runs import Column, Run

FLOOR, CEILING = 0.05, 0.95  # scores, 0 to 1, below and above which there is no room for a difference
DEVIATES = 1.96  # of the normal distribution, for 95 %


def without_room(runs: Sequence[Run]) -> dict[str, str]:
    """Benchmark → why no row's score could have differed from another's; those with room are left out."""
    names = dict.fromkeys(name for run in runs for name in run.benchmarks)
    reasons = {
        name: _reason([run.benchmarks[name] for run in runs if name in run.benchmarks]) for name in names
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _reason(columns: Sequence[Column]) -> str | None:
    """Why one benchmark's rows cannot differ; None if they can."""
    scores = [np.array(list(column.items["score"].values())) for column in columns]
    means = [values.mean() for values in scores]
    if max(means) < FLOOR:
        return (
            f"every row scores below {FLOOR:.0%}: the questions are too hard for this model, or it does not "
            "answer in the form that counts"
        )
    if min(means) > CEILING:
        return f"every row scores above {CEILING:.0%}: the questions are too easy for this model"
    chances = [column.chance for column in columns]
    if all(
        chance is not None and _near(values, chance) for values, chance in zip(scores, chances, strict=True)
    ):
        return (
            f"every row is within its error of guessing ({chances[0]:.0%}): the model does not know the "
            "answers, or the items are too few"
        )
    return None


def _near(values: np.ndarray, chance: float) -> bool:
    """Whether a mean is what guessing would give, within 95 %."""
    # Right or wrong: the spread of guessing, which a handful of items may not show.
    binary = np.isin(values, (0, 1)).all()
    spread = math.sqrt(chance * (1 - chance)) if binary else values.std()
    return bool(abs(values.mean() - chance) <= DEVIATES * spread / math.sqrt(len(values)))


def chat_note(model: str, tokenizer: Any) -> str | None:
    """A line on a model that seems to be made for chats, which the benchmarks ask without its template."""
    if not getattr(tokenizer, "chat_template", None) or re.search(r"(?<![a-z])base(?![a-z])", model.lower()):
        return None
    return (
        f"{model} has a chat template, and the benchmarks ask without it: a chat model that is asked so can "
        "score near zero where an answer must have a form"
    )


def cut_note(run: Run, name: str) -> str | None:
    """A line on the prompts of a benchmark that were too long; None if there were none."""
    column = run.benchmarks[name]
    if not column.cut:
        return None
    return (
        f"{name}: {len(column.cut)} of {len(column.items['score'])} items have a prompt that does not fit "
        f"into {column.max_model_len} tokens with its answer, and were asked without its beginning"
    )


def check_same_prompts(runs: Sequence[Run]) -> None:
    """Rows that cut prompts at different lengths answered different questions.

    Raises:
        EvaluationError: two rows did.
    """
    for name in dict.fromkeys(name for run in runs for name in run.benchmarks):
        rows = [run for run in runs if name in run.benchmarks]
        lengths = {run.condition: run.benchmarks[name].max_model_len for run in rows}
        known = {length for length in lengths.values() if length is not None}
        if len(known) > 1 and any(run.benchmarks[name].cut for run in rows):
            each = ", ".join(f"{condition} {length}" for condition, length in lengths.items())
            raise EvaluationError(
                f"{name}: the rows cut long prompts at different lengths ({each} tokens), so that they were "
                f"not asked the same; give --max-model-len {min(known)} and another --output"
            )


def notes(runs: Sequence[Run]) -> list[str]:
    """What the rows themselves have to say, each once."""
    cut = (cut_note(run, name) for run in runs for name in run.benchmarks)
    return list(dict.fromkeys([*(note for run in runs for note in run.notes), *filter(None, cut)]))
