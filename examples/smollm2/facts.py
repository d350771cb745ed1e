"""Calibration sequences of question-answer pairs, and which of their positions predict answers.

    python examples/smollm2/facts.py MODEL --out DIR [--positions 1000]

writes ids.json and positions.json for `cor-vllm calibrate --token-ids … --positions …`: TriviaQA items that
are not among those of the tasks in examples/smollm2/tasks.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any


def sequences(
    rows: list[dict[str, Any]], tokenizer: Any, wanted: int, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """(token ids, positions that predict the answer's tokens) of items until there are `wanted` positions."""
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    found = 0
    for row in rows:
        question = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        answer = tokenizer(f" {row['answer']['value']}").input_ids
        ids.append(question + answer)
        positions.append(list(range(len(question) - 1, len(question) + len(answer) - 1)))
        found += len(answer)
        if found >= wanted:
            break
    return ids, positions


def main() -> None:
    """The command line."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", help="folder with the tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--positions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mirror", type=Path, default=Path(__file__).parent / "work" / "mirror")
    args = parser.parse_args()
    asked = {row["question"] for row in read(args.mirror / "local/trivia_choices/default/test.jsonl")}
    rows = read(args.mirror / "mandarjoshi/trivia_qa/rc.nocontext/validation.jsonl")
    unasked = [row for row in rows if row["question"] not in asked]
    ids, positions = sequences(unasked, AutoTokenizer.from_pretrained(args.model), args.positions, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "ids.json").write_text(json.dumps(ids))
    (args.out / "positions.json").write_text(json.dumps(positions))
    print(f"{len(ids)} items, {sum(map(len, positions))} positions, {sum(map(len, ids))} tokens")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    with path.open(encoding="utf-8") as lines:  # splitlines() would break at U+2028 inside a string
        return [json.loads(line) for line in lines]


if __name__ == "__main__":
    main()
