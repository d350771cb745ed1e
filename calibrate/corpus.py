"""Calibration text: where documents come from, and how sequences are drawn from them."""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cor_vllm.calibrate.config import DEFAULT_CORPUS, CalibrationError

DEFAULT_CORPUS_FILE = Path(__file__).with_name("data") / "default_corpus.txt"
C4_DOCUMENTS = 2000  # of the validation split, from its start: about a million tokens
QUESTION = "Question: {question}\nAnswer:"  # how --answers puts a question; a space and the answer follow
POOL = 8  # windows are drawn from a pool of this many times the positions needed, or from all there are

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Corpus:
    """Documents by name, with what identifies them in the scores file."""

    name: str
    sha256: str
    documents: Sequence[str]


def load_corpus(name: str) -> Corpus:
    """Read the shipped corpus (`default`), C4 validation (`c4`), or a text or JSONL file.

    In a text file blank lines separate documents; in a `.jsonl` file every line is an object whose `text` is
    one document.

    Raises:
        CalibrationError: no such file, not UTF-8, not JSONL, or the extra that `c4` needs is missing.
    """
    if name == "c4":
        return _c4()
    path = DEFAULT_CORPUS_FILE if name == DEFAULT_CORPUS else Path(name)
    data = read_input(path, "--corpus")
    text = _text(data, path, "--corpus")
    documents = list(_jsonl(text, path) if path.suffix == ".jsonl" else _paragraphs(text))
    label = DEFAULT_CORPUS if name == DEFAULT_CORPUS else path.name
    return Corpus(label, hashlib.sha256(data).hexdigest(), documents)


def read_input(path: Path, option: str) -> bytes:
    """The bytes of a file that an option names, or a CalibrationError that names both."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CalibrationError(
            f"{option} {path}: cannot be read ({error.strerror}); check the path"
        ) from None


def _text(data: bytes, path: Path, option: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{option} {path}: not UTF-8 text (byte {error.start}); convert it") from None


def _paragraphs(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []


def _jsonl(text: str, path: Path) -> Iterator[str]:
    for number, (document,) in _rows(text, "text"):
        if document is None:
            raise CalibrationError(f"--corpus {path}: line {number} is no JSON object with a string `text`")
        yield document


def _rows(text: str, *keys: str) -> Iterator[tuple[int, list[str | None]]]:
    """(number from 1, the strings under `keys`, None where there is none) of every line that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            values = [row.get(key) if isinstance(row, dict) else None for key in keys]
            yield number, [value if isinstance(value, str) else None for value in values]


def _c4() -> Corpus:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError("--corpus c4 needs the package datasets: pip install 'cor-vllm[c4]'") from None
    stream = load_dataset("allenai/c4", "en", split="validation", streaming=True)
    documents = [row["text"] for row in stream.take(C4_DOCUMENTS)]
    return Corpus("c4", hashlib.sha256("\0".join(documents).encode()).hexdigest(), documents)


def draw(
    corpus: Corpus, tokenize: Tokenize, prefix: list[int], seq_len: int, parts: Sequence[int], seed: int
) -> list[list[list[int]]]:
    """Draw disjoint sets of sequences with exactly the wanted numbers of positions.

    Documents, in an order drawn from `seed`, are cut into windows of at most `seq_len` tokens; the windows
    are shuffled and dealt out, each to one part only. The last window of a part is cut to the exact number.

    Args:
        corpus: the documents.
        tokenize: text → token ids, without special tokens.
        prefix: ids that the model expects before any text (its BOS, or nothing); opens every sequence.
        seq_len: tokens of a sequence, prefix included.
        parts: positions wanted in each part; a sequence of S tokens has S−1.
        seed: of both shuffles.

    Returns:
        One list of sequences per part.

    Raises:
        CalibrationError: the corpus is too short.
    """
    rng = random.Random(seed)
    documents = list(corpus.documents)
    rng.shuffle(documents)
    windows = _pool(map(tokenize, documents), prefix, seq_len, POOL * sum(parts))
    rng.shuffle(windows)
    found = sum(len(window) - 1 for window in windows)
    supply = iter(windows)
    drawn: list[list[list[int]]] = []
    for wanted in parts:
        sequences: list[list[int]] = []
        while wanted > 0:
            window = next(supply, None)
            if window is None:
                raise CalibrationError(
                    f"--corpus {corpus.name}: holds {found} positions in sequences of at most {seq_len} "
                    f"tokens, but {sum(parts)} are needed for calibration and held-out check; give more "
                    "text, or lower --num-tokens or --heldout-tokens"
                )
            sequences.append(window[: wanted + 1])
            wanted -= len(sequences[-1]) - 1
        drawn.append(sequences)
    return drawn


def _pool(documents: Iterable[list[int]], prefix: list[int], seq_len: int, positions: int) -> list[list[int]]:
    body = seq_len - len(prefix)
    windows: list[list[int]] = []
    for ids in documents:
        windows += [prefix + ids[start : start + body] for start in range(0, len(ids), body)]
        windows = [window for window in windows if len(window) >= 2]
        if sum(len(window) - 1 for window in windows) >= positions:
            break
    return windows


def read_answers(path: Path) -> tuple[list[tuple[str, str]], str]:
    """`--answers`: (question, answer) of every line of a JSONL file, with the file's SHA-256.

    Raises:
        CalibrationError: unreadable, not UTF-8, or a line that is no object with both, neither empty.
    """
    data = read_input(path, "--answers")
    items = []
    for number, row in _rows(_text(data, path, "--answers"), "question", "answer"):
        question, answer = ((value or "").strip() for value in row)
        if not (question and answer):
            raise CalibrationError(
                f"--answers {path}: line {number} is no JSON object with a `question` and an `answer`"
            )
        items.append((question, answer))
    return items, hashlib.sha256(data).hexdigest()


def draw_answers(
    items: Sequence[tuple[str, str]], tokenize: Tokenize, prefix: list[int], wanted: int, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Question-answer pairs, in an order drawn from `seed`, until they have `wanted` positions.

    Returns:
        (sequences, per sequence the positions that predict the answer's tokens).

    Raises:
        CalibrationError: there are too few.
    """
    order = list(items)
    random.Random(seed).shuffle(order)
    sequences: list[list[int]] = []
    positions: list[list[int]] = []
    found = 0
    for question, answer in order:
        if found >= wanted:
            break
        asked = prefix + tokenize(QUESTION.format(question=question))
        sequence = asked + tokenize(f" {answer}")
        sequences.append(sequence)
        positions.append(list(range(len(asked) - 1, len(sequence) - 1)))
        found += len(sequence) - 1
    if found < wanted:
        raise CalibrationError(
            f"--answers: the {len(order)} questions hold {found} positions, {wanted} are wanted; give more "
            "questions, or lower --num-tokens"
        )
    return sequences, positions


def read_token_ids(path: Path, vocab_size: int) -> tuple[list[list[int]], str]:
    """`--token-ids`: a JSON list of lists of ids, each a sequence of at least 2; with the file's SHA-256."""
    sequences = _json_lists(path, "--token-ids", "token ids")
    for number, ids in enumerate(sequences):
        if len(ids) < 2:
            raise CalibrationError(f"--token-ids {path}: sequence {number} has {len(ids)} tokens, needs 2")
        if max(ids) >= vocab_size:
            raise CalibrationError(
                f"--token-ids {path}: sequence {number} holds {max(ids)}, the vocabulary has {vocab_size}"
            )
    if not sequences:
        raise CalibrationError(f"--token-ids {path}: holds no sequence")
    return sequences, hashlib.sha256(read_input(path, "--token-ids")).hexdigest()


def read_positions(path: Path, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """`--positions`: per sequence the indexes t, from 0, of the hard positions (t predicts token t+1)."""
    positions = _json_lists(path, "--positions", "positions")
    if len(positions) != len(sequences):
        raise CalibrationError(
            f"--positions {path}: {len(positions)} lists for {len(sequences)} sequences, give one for each"
        )
    for number, (indexes, ids) in enumerate(zip(positions, sequences, strict=True)):
        if indexes and max(indexes) > len(ids) - 2:
            raise CalibrationError(
                f"--positions {path}: list {number} holds {max(indexes)}, the last position of a sequence of "
                f"{len(ids)} tokens is {len(ids) - 2}"
            )
    if not any(positions):
        raise CalibrationError(f"--positions {path}: names no position")
    return [sorted(set(indexes)) for indexes in positions]


def _json_lists(path: Path, option: str, what: str) -> list[list[int]]:
    try:
        value = json.loads(read_input(path, option))
    except ValueError as error:
        raise CalibrationError(f"{option} {path}: not JSON ({error})") from None
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise CalibrationError(f"{option} {path}: must be a JSON list of lists of {what}")
    for row in value:
        if not all(type(item) is int and item >= 0 for item in row):
            raise CalibrationError(f"{option} {path}: {what} must be whole numbers from 0")
    return value
