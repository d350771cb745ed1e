"""What a given file is: told from its bytes, the same for every option, or refused by name."""

import bz2
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import pickle
import sqlite3
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.text.corpus import (
    CORPUS_WANTED,
    load_corpus,
    read_positions,
    read_token_ids,
)
from cor_vllm.calibrate.text.pairs import read_answers
from cor_vllm.calibrate.text.reading import read, shown

DOCUMENTS = ["Das Wort.", "Wer\n\nfragt?", "[1] \u2028é\ud55c"]
LINES = "\n".join(json.dumps({"id": i, "text": d}, ensure_ascii=False) for i, d in enumerate(DOCUMENTS))
FORMS = {
    "lines": LINES,
    "lines, escaped and with blank ones": "\n".join(f"\n{json.dumps({'text': d})}  " for d in DOCUMENTS),
    "lines of strings": "\n".join(json.dumps(d) for d in DOCUMENTS),
    "list of strings": json.dumps(DOCUMENTS),
    "list of objects": json.dumps([{"text": d} for d in DOCUMENTS]),
    "list over many lines": json.dumps([{"text": d} for d in DOCUMENTS], indent=6),
}
PACKED: dict[str, Callable[[str], bytes]] = {
    "UTF-8": str.encode,
    "with a byte-order mark": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16, big end first": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "gzip": lambda text: gzip.compress(text.encode()),
    "gzip of UTF-8 with a byte-order mark": lambda text: gzip.compress(text.encode("utf-8-sig")),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *itertools.product(["a.json", "a.jsonl", "a.ndjson", "A.JSONL.GZ", "a.jsonl.gzip"], FORMS),
        # Lines within quotation marks are prose where the name does not say JSON.
        *itertools.product(["a.txt", "a", "a.csv"], sorted(FORMS.keys() - {"lines of strings"})),
    ],
)
def test_documents_are_the_same_in_every_form(tmp_path: Path, name: str, form: str, packed: str) -> None:
    file = tmp_path / name
    data = PACKED[packed](FORMS[form])
    file.write_bytes(data)
    corpus = load_corpus(str(file))
    assert list(corpus.documents) == DOCUMENTS
    assert corpus.sha256 == hashlib.sha256(data).hexdigest(), "of the bytes as they are"


@pytest.mark.parametrize("packed", PACKED)
def test_prose_is_the_same_however_it_is_packed(tmp_path: Path, packed: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(PACKED[packed]("\nOne\ntwo.\n\n \nThree.\n"))
    assert list(load_corpus(str(file)).documents) == ["One\ntwo.", "Three."]


@pytest.mark.parametrize(
    "text",
    [
        "[1] Smith, J.", "[1]\nSmith", "{sic} he wrote", "[[Paris]] is a city.", '"Yes."', "[Music]", "{",
        "5", '["Yes," she said, "now."]', '["Smith 1990"] says so.', '["a"][0] is "a".',
        '{"Yes"} was cut there.', "GIF89a is a form of pictures.",
    ],
)  # fmt: skip
def test_prose_that_begins_like_json_stays_prose(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text(text)
    assert list(load_corpus(str(file)).documents) == [text]


@pytest.mark.parametrize("name", ["a.txt", "a"])
@pytest.mark.parametrize(
    "text",
    ['["a",\n"b",]', '["a", "b\\""]\n["c"', '[{"text": "a"},\n', '{"text": "a"}\n{"text": ', '{"text":'],
)
def test_broken_json_is_not_prose(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(CalibrationError, match=r"line [12] is not JSON \("):
        load_corpus(str(file))


@pytest.mark.parametrize("form", ["lines", "list"])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a.gz"])
def test_answers_and_ids_in_every_form(tmp_path: Path, name: str, packed: str, form: str) -> None:
    def written(values: list[object]) -> tuple[Path, str]:
        text = json.dumps(values) if form == "list" else "\n".join(map(json.dumps, values))
        file = tmp_path / name
        file.write_bytes(PACKED[packed](text))
        return file, hashlib.sha256(file.read_bytes()).hexdigest()

    pairs = [("Who?", "He"), ("Wo?", "É\u2028")]
    file, sha256 = written([{"question": q, "answer": a} for q, a in pairs])
    assert read_answers(file) == ([(q, a.strip()) for q, a in pairs], sha256)
    ids: list[object] = [[1, 2, 3], [4, 5]]
    file, sha256 = written(ids)
    assert read_token_ids(file, 6) == (ids, sha256)
    file, _ = written([[1, 0], []])
    assert read_positions(file, [[1, 2, 3], [4, 5]]) == [[0, 1], []]


def archive(kind: str) -> bytes:
    buffer, text = io.BytesIO(), LINES.encode()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("a.jsonl", text)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz" if kind == "tar.gz" else "w") as tar:
            info = tarfile.TarInfo("a.jsonl")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return buffer.getvalue()


def made(kind: str, folder: Path) -> bytes:
    """A file as the library that owns the form writes it."""
    file = folder / f"made.{kind}"
    if kind == "safetensors":
        save_file({"a": torch.zeros(2)}, file)
    elif kind == "pt":
        torch.save({"a": torch.zeros(2)}, file)
    elif kind == "npy":
        np.save(file, np.zeros(2))
        file = file.with_suffix(".npy")
    elif kind == "sqlite":
        with sqlite3.connect(file) as connection:
            connection.execute("create table a (text)")
        connection.close()
    else:
        pa = pytest.importorskip("pyarrow")
        table = pa.table({"text": DOCUMENTS})
        if kind == "parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, file)
        else:
            opened = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
            with opened(str(file), table.schema) as writer:
                writer.write_table(table)
    return file.read_bytes()


REFUSED: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "parquet": (lambda folder: made("parquet", folder), "is a Parquet file"),
    "arrow": (lambda folder: made("arrow", folder), "is an Arrow file"),
    "arrow stream": (lambda folder: made("stream", folder), "is an Arrow stream"),
    "zip": (lambda folder: archive("zip"), "is a zip archive"),
    "tar": (lambda folder: archive("tar"), "is a tar archive"),
    "tar.gz": (lambda folder: archive("tar.gz"), "is a tar archive"),
    "gzip twice": (lambda folder: gzip.compress(gzip.compress(b"a")), "a gzip file within a gzip file"),
    "xz": (lambda folder: lzma.compress(LINES.encode()), "is an xz file"),
    "bzip2": (lambda folder: bz2.compress(LINES.encode()), "is a bzip2 file"),
    "zstd": (lambda folder: b"\x28\xb5\x2f\xfd\x24\x05", "is a zstd file"),
    "pickle": (lambda folder: pickle.dumps(DOCUMENTS), "is a Python pickle"),
    "pt": (lambda folder: made("pt", folder), "is a zip archive"),
    "npy": (lambda folder: made("npy", folder), "is a NumPy file"),
    "safetensors": (lambda folder: made("safetensors", folder), "is a safetensors file"),
    "sqlite": (lambda folder: made("sqlite", folder), "is an SQLite database"),
    "pdf": (lambda folder: b"%PDF-1.7\n%\xe2\xe3", "is a PDF"),
    "html": (lambda folder: b"\n<!DOCTYPE html><p>Hello", "is a web page"),
    "xml": (lambda folder: b'<?xml version="1.0"?><a/>', "is a web page or an XML file"),
    "half a gzip": (lambda folder: gzip.compress(LINES.encode())[:-9], "damaged or incomplete gzip"),
    "UTF-16 without a mark": (lambda folder: "Words".encode("utf-16-le"), "character 1 is NUL"),
    "Latin-1": (lambda folder: b"caf\xe9", "not UTF-8 text .byte 3."),
    "half of UTF-16": (lambda folder: "Words".encode("utf-16")[:-1], "not UTF-16 text"),
    "nothing": (lambda folder: b"", "is empty"),
    "a mark alone": (lambda folder: b"\xef\xbb\xbf\r\n", "is empty"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_forms_are_refused_by_name_whatever_the_file_is_called(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    data = make(tmp_path)
    for name in ("a.txt", "a.json", "a.gz"):
        file = tmp_path / name
        file.write_bytes(data)
        for use in (
            lambda file: load_corpus(str(file)),
            read_answers,
            lambda file: read_token_ids(file, 9),
            lambda file: read_positions(file, [[1, 2]]),
        ):
            with pytest.raises(CalibrationError, match=f"^--[a-z-]+ .*{name}: .*{message}") as refused:
                use(file)
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.csv.gz", "a.yaml", "a.html"])
def test_text_that_only_its_name_tells_from_prose(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(b"text,id\nWord,1\n") if name.endswith("gz") else b"text,id\nWord,1\n")
    with pytest.raises(CalibrationError, match=r"is a (CSV table|TSV table|YAML file|web page); give plain"):
        load_corpus(str(file))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"messages": [{"role": "user", "content": "Who?"}]}, "line 2 is an object with `messages`; give"),
        ({"id": 1, "conversations": []}, "line 2 is an object with `id`, `conversations`; give"),
        ({"prompt": "Who?", "completion": "He"}, "line 2 is an object with `prompt`, `completion`; give"),
        ({"text": ["a"]}, "`text` of line 2 is a list, not a string; give"),
        ({"text\u200b": "a"}, r"an object with `text\\u200b`; give"),
        ({}, "line 2 is an empty object"),
        (None, "line 2 is null"),
        ({"text": "\ud83d"}, r"line 2 holds half a character, '\\ud83d'"),
    ],
)
def test_records_without_what_is_wanted_say_what_they_have(tmp_path: Path, line: object, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": "a"}}\n{json.dumps(line)}\n')
    with pytest.raises(CalibrationError, match=reason) as refused:
        load_corpus(str(file))
    assert str(refused.value).endswith(f"give {CORPUS_WANTED}")


def test_what_cannot_be_seen_in_a_line_is_shown(tmp_path: Path) -> None:
    """Two files with marks, one behind the other: the second mark opens line 2."""
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"text": "a"}\n'.encode("utf-8-sig") * 2)
    with pytest.raises(CalibrationError, match=r'line 2 is not JSON .*: \\ufeff\{"text": "a"\}; give'):
        load_corpus(str(file))
    file.write_text('{"text": "a"}\n{"text":\u00a0"b"}\n', encoding="utf-8")
    with pytest.raises(
        CalibrationError, match=r'line 2 is not JSON \(Expecting value, column 9\): \{"text":\\xa0"b"'
    ):
        load_corpus(str(file))
    assert shown("a" * 100) == "a" * 60 + "…" and shown("é\t\u202e한") == "é\\t\\u202e한"


def test_an_error_in_a_long_list_names_its_own_line(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[\n  "one",\n  "two"\n  "three"\n]\n')
    with pytest.raises(CalibrationError, match=r'line 4 is not JSON \(Expecting .*: {3}"three"; give'):
        load_corpus(str(file))
    file.write_text("[" * 100_000)
    with pytest.raises(CalibrationError, match=r"line 1 is not JSON that can be read \(nested too deep"):
        load_corpus(str(file))


def test_a_file_is_read_once(tmp_path: Path) -> None:
    """A pipe can be read no second time."""
    pipe = tmp_path / "ids"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("[[1, 2]]"))
    writer.start()
    try:
        assert read_token_ids(pipe, 9)[0] == [[1, 2]]
    finally:
        writer.join()


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot be read \(Is a directory\)"):
        read(tmp_path, "--corpus", "text")
