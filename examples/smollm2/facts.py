"""Questions with their answers for `cor-vllm calibrate --answers`: TriviaQA items that no task here asks.

python examples/smollm2/facts.py --out FILE
"""

import argparse
import json
from pathlib import Path
from typing import Any


def unasked(mirror: Path) -> list[dict[str, str]]:
    """TriviaQA's items that are not among those of the tasks in examples/smollm2/tasks."""
    asked = {row["question"] for row in read(mirror / "local/trivia_choices/default/test.jsonl")}
    rows = read(mirror / "mandarjoshi/trivia_qa/rc.nocontext/validation.jsonl")
    return [
        {"question": row["question"], "answer": row["answer"]["value"]}
        for row in rows
        if row["question"] not in asked
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file."""
    with path.open(encoding="utf-8") as lines:  # splitlines() would break at U+2028 inside a string
        return [json.loads(line) for line in lines]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mirror", type=Path, default=Path(__file__).parent / "work" / "mirror")
    args = parser.parse_args()
    rows = unasked(args.mirror)
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{args.out}: {len(rows)} questions")


if __name__ == "__main__":
    main()
