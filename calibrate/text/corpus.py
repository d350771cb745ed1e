"""Calibration text: reads documents and draws token sequences from them."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cor_vllm.calibrate.config import DEFAULT_CORPUS, CalibrationError
from cor_vllm.calibrate.text.reading import Given, Row, described, read

DEFAULT_CORPUS_FILE = Path(__file__).parents[1] / "data" / "default_corpus.txt"
C4_DOCUMENTS = 2000  # the first ones of the validation split: about a million tokens
JSON = "JSON (a list, or one value a line)"
CORPUS_WANTED = f"plain text, or {JSON} of strings or of objects with a string `text`"
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
        return given.whole(row, row.value)
    return given.strings(row, "text")[0]


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
    windows = draw_windows(corpus, tokenize, prefix, seq_len, sum(parts), seed)
    found = sum(len(window.ids) - 1 for window in windows)
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
            sequences.append(window.ids[: wanted + 1])
            wanted -= len(sequences[-1]) - 1
        drawn.append(sequences)
    return drawn


class Window(NamedTuple):
    """Consecutive tokens of one document."""

    document: int  # its number in the corpus
    ids: list[int]  # the prefix included


def draw_windows(
    corpus: Corpus, tokenize: Tokenize, prefix: list[int], seq_len: int, positions: int, seed: int
) -> list[Window]:
    """Cut documents into windows, in an order drawn from `seed`.

    Args:
        corpus, tokenize, prefix, seq_len, seed: as `draw` has them.
        positions: how many are wanted; the windows hold POOL times as many, or all that there are.

    Returns:
        Windows of 2 to `seq_len` tokens, shuffled over all documents.
    """
    rng = random.Random(seed)
    documents = list(enumerate(corpus.documents))
    rng.shuffle(documents)
    body, found = seq_len - len(prefix), 0
    windows: list[Window] = []
    for number, text in documents:
        ids = tokenize(text)
        cut = [prefix + ids[start : start + body] for start in range(0, len(ids), body)]
        windows += [Window(number, window) for window in cut if len(window) >= 2]
        found += sum(max(len(window) - 1, 0) for window in cut)
        if found >= POOL * positions:
            break
    rng.shuffle(windows)
    return windows


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
