"""Where the tokens come from."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cor_vllm.calibrate.config import CalibrationError, CalibrationOptions
from cor_vllm.calibrate.text.corpus import Corpus, draw, load_corpus, read_positions, read_token_ids
from cor_vllm.calibrate.text.inputs import read_inputs
from cor_vllm.testing import tiny_models


def numbers(documents: list[int]) -> Corpus:
    """Documents of unique token ids, so that every window can be recognised."""
    texts, start = [], 1
    for length in documents:
        texts.append(" ".join(map(str, range(start, start + length))))
        start += length
    return Corpus("numbers", "0" * 64, texts)


def tokenize(text: str) -> list[int]:
    return [int(word) for word in text.split()]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=5, max_size=20),
    st.integers(2, 16),
    st.lists(st.integers(0, 15), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 5),
)
def test_drawn_sequences(lengths: list[int], seq_len: int, parts: list[int], bos: bool, seed: int) -> None:
    prefix = [0] if bos else []
    corpus = numbers(lengths)
    try:
        drawn = draw(corpus, tokenize, prefix, seq_len, parts, seed)
    except CalibrationError:
        return
    assert [sum(len(ids) - 1 for ids in part) for part in drawn] == parts, "exactly the positions asked for"
    assert all(2 <= len(ids) <= seq_len for part in drawn for ids in part)
    assert all(ids[: len(prefix)] == prefix for part in drawn for ids in part)
    tokens = [token for part in drawn for ids in part for token in ids[len(prefix) :]]
    assert len(tokens) == len(set(tokens)), "no token of the corpus is used twice"
    for part in drawn:
        for ids in part:
            body = ids[len(prefix) :]
            assert body == list(range(body[0], body[0] + len(body))), "windows are contiguous text"
    assert drawn == draw(corpus, tokenize, prefix, seq_len, parts, seed)


def test_the_seed_decides() -> None:
    corpus = numbers([50] * 20)
    first, second = (draw(corpus, tokenize, [], 10, [90], seed) for seed in (0, 1))
    assert first != second
    assert len({ids[0] // 50 for ids in first[0]}) > 3, "sequences come from several documents"


def test_too_short_a_corpus() -> None:
    with pytest.raises(CalibrationError, match=r"numbers: holds 36 positions .* but 40 are needed"):
        draw(numbers([20, 20]), tokenize, [], 10, [30, 10], 0)


def test_text_and_jsonl_files_hold_the_same_documents(tmp_path: Path) -> None:
    documents = ["one\ntwo", "three", "fünf\u2028sechs"]
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("\n\none\ntwo\n\n \nthree\n\nfünf\u2028sechs", encoding="utf-8")
    lines.write_text("\n".join(json.dumps({"text": d, "id": 1}, ensure_ascii=False) for d in documents))
    from_text, from_lines = load_corpus(str(text)), load_corpus(str(lines))
    assert list(from_lines.documents) == documents
    assert [d.split() for d in from_text.documents] == [d.split() for d in documents]
    assert from_text.name == "a.txt"
    assert from_text.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()


def test_the_shipped_corpus() -> None:
    corpus = load_corpus("default")
    size = sum(len(document.encode()) for document in corpus.documents)
    assert corpus.name == "default"
    assert len(corpus.documents) > 20 and 100_000 < size <= 300_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "cannot be read"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": 1}', "line 2"),
        ("bad.jsonl", b'["a", 3]', "item 2 is a number; give plain text, or JSON"),
        ("bad.jsonl", b"{", "line 1 is not JSON"),
    ],
)
def test_unusable_corpus_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load_corpus(str(tmp_path / name))


def test_c4_without_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install 'cor-vllm\[c4\]'"):
        load_corpus("c4")


def test_c4_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Stream:
        def take(self, count: int) -> list[dict[str, str]]:
            calls.append(count)
            return [{"text": "a"}, {"text": "b"}]

    def load_dataset(*args: object, **kwargs: object) -> Stream:
        calls.append((args, kwargs))
        return Stream()

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    corpus = load_corpus("c4")
    assert calls[0] == (("allenai/c4", "en"), {"split": "validation", "streaming": True})
    assert (corpus.name, list(corpus.documents)) == ("c4", ["a", "b"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ('{"a": 1}', r"line 1 is an object with `a`; give JSON .* of lists of token ids"),
        ("[1]", r"item 1 is a number; give JSON .* of lists of token ids"),
        ("[[1, -1]]", "whole numbers"),
        ("[[1, true]]", "whole numbers"),
        ("[[1, 2.0]]", "whole numbers"),
        ("[[1, 2], [3]]", "sequence 1 has 1 tokens"),
        ("[[1, 512]]", "sequence 0 holds 512, the vocabulary has 512"),
        ("[]", "no sequence"),
    ],
)
def test_unusable_token_ids(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "ids.json"
    file.write_text(content)
    with pytest.raises(CalibrationError, match=message):
        read_token_ids(file, 512)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[0]]", "1 lists for 2 sequences"),
        ("[[0], [3]]", "list 1 holds 3, the last position of a sequence of 4 tokens is 2"),
        ("[[], []]", "names no position"),
    ],
)
def test_unusable_positions(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "positions.json"
    file.write_text(content)
    with pytest.raises(CalibrationError, match=message):
        read_positions(file, [[1, 2], [1, 2, 3, 4]])


def options(**values: object) -> CalibrationOptions:
    return CalibrationOptions(model="m", output="o", **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.byte_tokenizer().save_pretrained(folder)
    return folder


def test_inputs_from_a_corpus(tokenizer_folder: Path) -> None:
    inputs = read_inputs(options(num_tokens=100, seq_len=32, heldout_tokens=50), tokenizer_folder, 512)
    assert sum(len(ids) - 1 for ids in inputs.sequences) == 100
    assert sum(len(ids) - 1 for ids in inputs.heldout) == 50
    assert inputs.tuning == [] and inputs.name == inputs.heldout_corpus == "default"


def test_tuning_takes_half_of_the_heldout_positions(tokenizer_folder: Path) -> None:
    inputs = read_inputs(options(num_tokens=60, heldout_tokens=51, tune=True), tokenizer_folder, 512)
    assert sum(len(ids) - 1 for ids in inputs.tuning) == 25
    assert sum(len(ids) - 1 for ids in inputs.heldout) == 26


def test_inputs_from_token_ids(tmp_path: Path, tokenizer_folder: Path) -> None:
    ids, positions = tmp_path / "ids.json", tmp_path / "positions.json"
    ids.write_text("[[1, 2, 3], [4, 5]]")
    positions.write_text("[[1, 0, 1], []]")
    alone = read_inputs(options(token_ids=ids, positions=positions), tmp_path / "no tokenizer", 512)
    assert alone.sequences == [[1, 2, 3], [4, 5]] and alone.hard_positions == [[0, 1], []]
    assert alone.heldout == [] and alone.heldout_corpus is None and alone.name == "ids.json"
    both = read_inputs(options(token_ids=ids, corpus="default", heldout_tokens=40), tokenizer_folder, 512)
    assert both.sequences == alone.sequences and both.sha256 == alone.sha256
    assert sum(len(row) - 1 for row in both.heldout) == 40 and both.heldout_corpus == "default"


QUESTIONS = ["Who wrote it?", "Where is it?", "When was that?"]


def answers_file(folder: Path) -> Path:
    file = folder / "answers.jsonl"
    rows = [{"question": q, "answer": f"No {i}\u2028one"} for i, q in enumerate(QUESTIONS)]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return file


def test_inputs_from_answers(tmp_path: Path, tokenizer_folder: Path) -> None:
    chosen = options(answers=answers_file(tmp_path), num_tokens=70, heldout_tokens=40)
    inputs = read_inputs(chosen, tokenizer_folder, 512)
    assert len(inputs.sequences) == 2 and inputs.hard_positions is not None
    decode = AutoTokenizer.from_pretrained(tokenizer_folder).decode
    for ids, positions in zip(inputs.sequences, inputs.hard_positions, strict=True):
        question, answer = decode(ids).split("\nAnswer:")
        assert question.removeprefix("Question: ") in QUESTIONS
        assert decode([ids[t + 1] for t in positions]) == answer and answer.startswith(" No ")
    assert inputs.name == "answers.jsonl" and inputs.heldout_corpus == "default"
    assert sum(len(row) - 1 for row in inputs.heldout) == 40
    other = read_inputs(chosen.model_copy(update={"seed": 1}), tokenizer_folder, 512)
    assert other.sequences != inputs.sequences


def test_unusable_answers(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = answers_file(tmp_path)
    with pytest.raises(CalibrationError, match=r"3 questions hold .* positions, 1000 are wanted"):
        read_inputs(options(answers=file), tokenizer_folder, 512)
    for line, reason in (
        ('{"question": "Who?"}', "line 2 is an object with `question`; give JSON"),
        ('["a", "b"]', "line 2 is a list; give JSON"),
        ('{"question": "Who?", "answer": " "}', "line 2 has an empty `answer`"),
        ('{"question": "Who?", "answer": 3}', "`answer` of line 2 is a number, not a string"),
        ("Who?", r"line 2 is not JSON \(Expecting value, column 1\): Who\?; give JSON"),
    ):
        file.write_text('{"question": "Who?", "answer": "He"}\n' + line)
        with pytest.raises(CalibrationError, match=reason):
            read_inputs(options(answers=file), tokenizer_folder, 512)


def test_a_bos_that_the_tokenizer_adds_opens_every_sequence(tmp_path: Path) -> None:
    tokenizer = tiny_models.byte_tokenizer()
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    tokenizer.save_pretrained(tmp_path)
    inputs = read_inputs(options(num_tokens=100, seq_len=32, heldout_tokens=50), tmp_path, 512)
    for ids in inputs.sequences + inputs.heldout:
        assert ids[0] == 256 and 256 not in ids[1:] and len(ids) <= 32


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no usable tokenizer .* or give --token-ids"):
        read_inputs(options(), tmp_path, 512)


def test_an_empty_tokenizer_is_none(tmp_path: Path) -> None:
    """What transformers gives for a folder that has a configuration and no tokenizer."""
    tiny_models.create("qwen3_moe").config.save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=r"no usable tokenizer \(it makes no tokens of a text\)"):
        read_inputs(options(), tmp_path, 512)
