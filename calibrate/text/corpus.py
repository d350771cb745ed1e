"""Calibration text: reads documents and draws token sequences from them."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cor_vllm.calibrate.config import DEFAULT_CORPUS, CalibrationError
from cor_vllm.calibrate.text.reading import Given, Row, described, read

DEFAULT_CORPUS_FILE = Path(__file__).parents[1] / "data" / "default_corpus.txt"
C4_DOCUMENTS = 2000  # the first ones of the validation split: about a million tokens
QUESTION = "Question: {question}\nAnswer:"  # how --answers asks; a space and the answer follow
JSON = "JSON (a list, or one value a line)"
CORPUS_WANTED = f"plain text, or {JSON} of strings or of objects with a string `text`"
ANSWERS_WANTED = f"{JSON} of objects with strings `question` and `answer`"
LISTS_WANTED = f"{JSON} of lists of"
POOL = 8  # windows are drawn from a pool of this many times the positions needed, or from all there are

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Corpus:
    """Documents by name, with what identifies them in the scores file."""

    name: str
    sha256: str
    documents: Sequence[str]


def load_corpus(name: str) -> Corpus:
    """Read the shipped corpus (`default`), C4 validation (`c4`), or a file of text or of JSON.

    In a text file blank lines separate documents. In a JSON file (a list, or one value a line) each document
    is a string, or an object with a string `text`. `reading` tells the forms apart and refuses all others.

    Raises:
        CalibrationError: the file cannot be read or has another form, or a package that `c4` needs is
            missing.
    """
    if name == "c4":
        return _c4()
    path = DEFAULT_CORPUS_FILE if name == DEFAULT_CORPUS else Path(name)
    given = read(path, "--corpus", CORPUS_WANTED)
    if given.is_json():
        documents = [_document(given, row) for row in given.rows()]
    else:
        documents = list(_paragraphs(given.text))
    return Corpus(DEFAULT_CORPUS if name == DEFAULT_CORPUS else path.name, given.sha256, documents)


def _document(given: Given, row: Row) -> str:
    if isinstance(row.value, str):
        return _whole(given, row, row.value)
    return _strings(given, row, "text")[0]


def _strings(given: Given, row: Row, *keys: str) -> list[str]:
    """The strings under `keys` of a row that is an object."""
    if not isinstance(row.value, dict) or not all(key in row.value for key in keys):
        given.refuse(f"{row.place} is {described(row.value)}")
    for key in keys:
        if not isinstance(row.value[key], str):
            given.refuse(f"`{key}` of {row.place} is {described(row.value[key])}, not a string")
    return [_whole(given, row, row.value[key]) for key in keys]


def _whole(given: Given, row: Row, text: str) -> str:
    """Return the text if a tokenizer can take it: JSON can escape half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        given.refuse(f"{row.place} holds half a character, {text[error.start : error.end]!a}")
    return text


def _paragraphs(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []


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

    Documents are taken in an order drawn from `seed` and cut into windows of at most `seq_len` tokens. The
    windows are shuffled and dealt out, each to one part only. The last window of a part is cut so that the
    number of positions is exact.

    Args:
        corpus: the documents.
        tokenize: text → token ids, without special tokens.
        prefix: ids that the model expects before any text (its BOS, or nothing); every sequence begins with
            them.
        seq_len: tokens of a sequence, prefix included.
        parts: positions wanted in each part; a sequence of S tokens has S−1.
        seed: seed of both shuffles.

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
    """Read `--answers`: (question, answer) of every record of a JSON file, and the file's SHA-256.

    Raises:
        CalibrationError: the file cannot be read, or a record is not an object with both, neither empty.
    """
    given = read(path, "--answers", ANSWERS_WANTED)
    items = []
    for row in given.rows():
        question, answer = (value.strip() for value in _strings(given, row, "question", "answer"))
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
    """Read `--token-ids`: lists of ids, each a sequence of at least 2, and the file's SHA-256."""
    given = read(path, "--token-ids", f"{LISTS_WANTED} token ids")
    sequences = _lists(given, "token ids")
    for number, ids in enumerate(sequences):
        if len(ids) < 2:
            raise CalibrationError(f"{given.name}: sequence {number} has {len(ids)} tokens, needs 2")
        if max(ids) >= vocab_size:
            raise CalibrationError(
                f"{given.name}: sequence {number} holds {max(ids)}, the vocabulary has {vocab_size}"
            )
    if not sequences:
        raise CalibrationError(f"{given.name}: holds no sequence")
    return sequences, given.sha256


def read_positions(path: Path, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Read `--positions`: for each sequence the indexes t, from 0, of its hard positions (t predicts t+1)."""
    given = read(path, "--positions", f"{LISTS_WANTED} positions")
    positions = _lists(given, "positions")
    if len(positions) != len(sequences):
        raise CalibrationError(
            f"{given.name}: {len(positions)} lists for {len(sequences)} sequences, give one for each"
        )
    for number, (indexes, ids) in enumerate(zip(positions, sequences, strict=True)):
        if indexes and max(indexes) > len(ids) - 2:
            raise CalibrationError(
                f"{given.name}: list {number} holds {max(indexes)}, the last position of a sequence of "
                f"{len(ids)} tokens is {len(ids) - 2}"
            )
    if not any(positions):
        raise CalibrationError(f"{given.name}: names no position")
    return [sorted(set(indexes)) for indexes in positions]


def _lists(given: Given, what: str) -> list[list[int]]:
    rows = given.rows()
    for row in rows:
        if not isinstance(row.value, list):
            given.refuse(f"{row.place} is {described(row.value)}")
        if not all(type(item) is int and item >= 0 for item in row.value):
            raise CalibrationError(f"{given.name}: {what} must be whole numbers from 0 ({row.place})")
    return [row.value for row in rows]
