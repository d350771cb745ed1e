"""Text in pairs: questions with answers, and prompts with completions."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.text.corpus import JSON, Tokenize
from cor_vllm.calibrate.text.reading import read

QUESTION = "Question: {question}\nAnswer:"  # how --answers asks; a space and the answer follow
ANSWERS_WANTED = f"{JSON} of objects with strings `question` and `answer`"
TRAJECTORIES_WANTED = (
    f"{JSON} of objects with strings `prompt` and `completion`, neither empty, and true or false as "
    "`verified`"
)


def read_answers(path: Path) -> tuple[list[tuple[str, str]], str]:
    """Read `--answers`: (question, answer) of every record of a JSON file, and the file's SHA-256.

    Raises:
        CalibrationError: the file cannot be read, or a record is not an object with both, neither empty.
    """
    given = read(path, "--answers", ANSWERS_WANTED)
    items = []
    for row in given.rows():
        question, answer = (value.strip() for value in given.strings(row, "question", "answer"))
        if not (question and answer):
            given.refuse(f"{row.place} has an empty `{'answer' if question else 'question'}`")
        items.append((question, answer))
    return items, given.sha256


def draw_answers(
    items: Sequence[tuple[str, str]], tokenize: Tokenize, prefix: list[int], wanted: int, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Take question-answer pairs, in an order drawn from `seed`, until they have `wanted` positions.

    Returns:
        The sequences, and for each the positions that predict the answer's tokens.

    Raises:
        CalibrationError: there are too few pairs.
    """
    pairs = [asked(question, answer) for question, answer in items]
    taken = take_pairs(pairs, tokenize, prefix, wanted, seed)
    found = sum(len(pair.ids) - 1 for pair in taken)
    if found < wanted:
        raise CalibrationError(
            f"--answers: the {len(items)} questions hold {found} positions, {wanted} are wanted; give more "
            "questions, or lower --num-tokens"
        )
    return [pair.ids for pair in taken], [pair.positions for pair in taken]


def asked(question: str, answer: str) -> tuple[str, str]:
    """The prompt and the completion that a question and its answer become."""
    return QUESTION.format(question=question), f" {answer}"


class Pair(NamedTuple):
    """A prompt with its completion, as tokens."""

    number: int  # of the pair among those that were given
    ids: list[int]
    positions: list[int]  # those that predict the completion's tokens


def take_pairs(
    pairs: Sequence[tuple[str, str]], tokenize: Tokenize, prefix: list[int], wanted: int, seed: int
) -> list[Pair]:
    """Take pairs of prompt and completion, in an order drawn from `seed`, until they have `wanted` positions.

    Args:
        pairs: the texts.
        tokenize, prefix: as `draw` has them; a prompt that begins with the prefix is not given another.
        wanted: positions of prompts and completions together; all pairs are taken if they hold fewer.
        seed: of the order.
    """
    order = list(enumerate(pairs))
    random.Random(seed).shuffle(order)
    taken: list[Pair] = []
    found = 0
    for number, (prompt, completion) in order:
        if found >= wanted:
            break
        ids = tokenize(prompt)
        before = ids if prefix and ids[: len(prefix)] == prefix else prefix + ids
        sequence = before + tokenize(completion)
        taken.append(Pair(number, sequence, list(range(max(len(before) - 1, 0), len(sequence) - 1))))
        found += len(sequence) - 1
    return taken


def read_trajectories(path: Path, verified: str) -> tuple[list[tuple[str, str]], str]:
    """Read `--trajectories`: (prompt, completion) of the records that count, and the file's SHA-256.

    Args:
        path: a JSON file.
        verified: "yes" takes those whose `verified` is true, "no" the others, "all" both.

    Raises:
        CalibrationError: the file cannot be read, a record has another form, or none counts.
    """
    given = read(path, "--trajectories", TRAJECTORIES_WANTED)
    pairs = []
    for row in given.rows():
        prompt, completion = given.strings(row, "prompt", "completion")
        if not (prompt and completion):
            given.refuse(f"{row.place} has an empty `{'completion' if prompt else 'prompt'}`")
        right = row.value.get("verified")
        if not isinstance(right, bool):
            given.refuse(f"{row.place} does not say whether it is verified")
        if verified == "all" or right == (verified == "yes"):
            pairs.append((prompt, completion))
    if not pairs:
        raise CalibrationError(
            f"{given.name}: no record counts with --verified {verified}; give --verified all"
        )
    return pairs, given.sha256
