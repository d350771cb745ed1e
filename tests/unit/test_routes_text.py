"""What a route analysis reads, and which document each sequence belongs to."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.routes.options import TextOptions
from cor_vllm.calibrate.routes.standard import ScoredText
from cor_vllm.calibrate.routes.text import check_lengths, read_scored_text
from cor_vllm.testing import tiny_models


def said(ids: Iterable[int]) -> str:
    return str(tiny_models.byte_tokenizer().decode(list(ids), skip_special_tokens=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that makes a token of each byte."""
    found = tmp_path_factory.mktemp("tokenizer")
    tiny_models.byte_tokenizer().save_pretrained(found)
    return found


def read(folder: Path, **values: Any) -> ScoredText:
    return read_scored_text(TextOptions(model="m", **values), folder, tiny_models.VOCAB)


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_windows_of_one_document_keep_its_number(folder: Path, tmp_path: Path) -> None:
    texts = ["a" * 40, "b" * 10, "c" * 30]
    corpus = lines(tmp_path / "corpus.jsonl", texts)
    found = read(folder, corpus=str(corpus), seq_len=16)
    for ids, document, positions in zip(found.sequences, found.documents, found.positions, strict=True):
        assert set(said(ids)) == set(texts[document])
        assert positions == list(range(len(ids) - 1))
    assert sorted(set(found.documents)) == [0, 1, 2] and len(found.documents) > 5


def test_as_many_positions_as_wanted_or_all_that_there_are(folder: Path, tmp_path: Path) -> None:
    corpus = lines(tmp_path / "corpus.jsonl", ["a" * 40, "b" * 40])
    for wanted, expected in ((33, 33), (10_000, 78)):
        found = read(folder, corpus=str(corpus), num_tokens=wanted)
        assert sum(map(len, found.positions)) == expected


def test_only_verified_completions_are_scored(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+1=", "completion": "2", "verified": True},
        {"prompt": "1+1=", "completion": "it is 2", "verified": True},
        {"prompt": "1+1=", "completion": "3", "verified": False},
        {"prompt": "2+2=", "completion": "4", "verified": True},
    ]
    file = lines(tmp_path / "t.jsonl", rows)
    scored = {}
    for verified in ("yes", "no", "all"):
        found = read(folder, trajectories=file, verified=verified)
        scored[verified] = {
            (document, said(ids[t + 1] for t in at))
            for ids, at, document in zip(found.sequences, found.positions, found.documents, strict=True)
        }
    assert scored["yes"] == {(0, "2"), (0, "it is 2"), (1, "4")}, "one prompt is one document"
    assert scored["no"] == {(0, "3")}
    assert scored["all"] == {(0, "2"), (0, "it is 2"), (0, "3"), (1, "4")}


def test_answers_are_scored_and_questions_are_not(folder: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", [{"question": "Who?", "answer": "She"}])
    found = read(folder, answers=file)
    [ids], [at] = found.sequences, found.positions
    assert said(ids[t + 1] for t in at) == " She"


def test_token_ids_are_read_as_they_are(folder: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "ids.jsonl", [[1, 2, 3], [4, 5]])
    found = read(folder, token_ids=file, num_tokens=1)
    assert (found.sequences, found.documents) == ([[1, 2, 3], [4, 5]], [0, 1])


@pytest.mark.parametrize(
    ("rows", "verified", "why"),
    [
        ([{"prompt": "p", "completion": "c"}], "yes", "does not say whether it is verified"),
        ([{"prompt": "p", "completion": "", "verified": True}], "yes", "an empty `completion`"),
        ([{"prompt": "p", "completion": "c", "verified": False}], "yes", "no record counts with"),
        ([{"text": "t"}], "yes", "an object with `text`"),
    ],
)
def test_what_is_not_a_trajectory_is_refused(
    folder: Path, tmp_path: Path, rows: list[Any], verified: str, why: str
) -> None:
    file = lines(tmp_path / "t.jsonl", rows)
    with pytest.raises(CalibrationError, match=why):
        read(folder, trajectories=file, verified=verified)


def test_a_text_of_one_token_holds_nothing_to_predict(folder: Path, tmp_path: Path) -> None:
    corpus = lines(tmp_path / "corpus.jsonl", ["a"])
    with pytest.raises(CalibrationError, match="holds no position"):
        read(folder, corpus=str(corpus))


def test_a_sequence_that_the_model_cannot_read_is_refused() -> None:
    text = ScoredText("t", "0" * 64, [[1] * 9], [[0]], [0])
    check_lengths(text, 9)
    with pytest.raises(CalibrationError, match="9 tokens, this model reads at most 8"):
        check_lengths(text, 8)


@pytest.mark.parametrize("values", [{"corpus": "c", "answers": "a"}, {"verified": "no"}])
def test_contradictions_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give"):
        TextOptions(model="m", **values)
