"""Questions with their answers for `cor-vllm calibrate --answers`: TriviaQA items that no task here asks.

python examples/smollm2/facts.py --out FILE
"""

import argparse
from pathlib import Path

import data


def unasked(mirror: Path) -> list[dict[str, str]]:
    """TriviaQA's items that are not among those of the tasks in examples/smollm2/tasks."""
    asked = {row["question"] for row in data.read_rows(mirror / "local/trivia_choices/default/test.jsonl")}
    rows = data.read_rows(mirror / "mandarjoshi/trivia_qa/rc.nocontext/validation.jsonl")
    return [
        {"question": row["question"], "answer": row["answer"]["value"]}
        for row in rows
        if row["question"] not in asked
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mirror", type=Path, default=Path(__file__).parent / "work" / "mirror")
    args = parser.parse_args()
    rows = unasked(args.mirror)
    data.write_rows(args.out, rows)
    print(f"{args.out}: {len(rows)} questions")


if __name__ == "__main__":
    main()
