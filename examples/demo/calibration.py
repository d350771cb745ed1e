"""Write the two calibration corpora; a document is a block of lines, a blank line stands between documents.

    python examples/demo/calibration.py --demo examples/demo/calibration.txt
    python examples/demo/calibration.py --default calibrate/data/default_corpus.txt

--demo: the demo model's own training mixture (facts as it saw them, prose that it did not see).
--default: the corpus that ships with the package, prose only, none of it in the demo model's training.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import corpus
import facts
import prose

SEED = 7
DEMO_CHARACTERS = 145_000
PASSAGE_WORDS = {"moby-dick": 900, "sotu": 600}
FACTBOOK_CHARACTERS = 95_000
FACTBOOK_WORDS = (300, 900)


def demo_corpus(work: Path) -> list[str]:
    """Documents in the training mixture, DEMO_CHARACTERS in all, shuffled."""
    rng = random.Random(SEED)
    sources = {
        1 - corpus.PROSE_SHARE: facts.training_documents(facts.build_facts(), SEED),
        corpus.PROSE_SHARE: [
            p for t in prose.documents(work, "demo_calibration").values() for p in prose.passages(t, 150)
        ],
    }
    chosen: list[str] = []
    for share, texts in sources.items():
        rng.shuffle(texts)
        chosen += _until(texts, DEMO_CHARACTERS * share)
    rng.shuffle(chosen)
    return chosen


def default_corpus(work: Path) -> list[str]:
    """One passage of each held-out chapter and address, and the longest profiles of countries, shuffled."""
    rng = random.Random(SEED)
    chosen = []
    for name, text in prose.documents(work, "default_corpus").items():
        source = "moby-dick" if name.startswith("chapter") else "sotu"
        found = prose.passages(text, PASSAGE_WORDS[source])
        # A chapter shorter than a passage comes whole; of a speech the opening courtesies are left out.
        chosen.append(text if not found else found[0] if source == "moby-dick" else found[len(found) // 2])
    low, high = FACTBOOK_WORDS
    profiles = [text for text in prose.factbook(work).values() if low <= len(text.split()) <= high]
    rng.shuffle(profiles)
    chosen += _until(profiles, FACTBOOK_CHARACTERS)
    chosen = [text for text in chosen if len(text.split()) >= low]
    rng.shuffle(chosen)
    return chosen


def _until(texts: list[str], characters: float) -> list[str]:
    chosen: list[str] = []
    for text in texts:
        if characters <= 0:
            break
        chosen.append(text)
        characters -= len(text) + 2
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path(__file__).parent / "work", help="where the texts are kept"
    )
    parser.add_argument("--demo", type=Path, help="write the demo model's corpus here")
    parser.add_argument("--default", type=Path, help="write the package's default corpus here")
    args = parser.parse_args()
    for path, build in ((args.demo, demo_corpus), (args.default, default_corpus)):
        if path:
            texts = build(args.work)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
            print(f"{path}: {len(texts)} documents, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
