"""Runs as one file: the score of every item under every condition, as CSV, compressed."""

import csv
import lzma
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from cor_vllm.errors import cause
from cor_vllm.evaluate import runs
from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.evaluate.runs import Column, Run


class Line(BaseModel):
    """One line of the file: an item's value, and what its row is."""

    condition: str
    control_of: str = ""  # as in runs.Run; empty: None, and what a file of before says
    draw_of: str = ""
    static: bool = False
    model: str = ""
    backend: str = ""
    benchmark: str
    quantity: str
    item: str
    value: float


def read(path: Path) -> list[Run]:
    """The runs of a folder that `cor-vllm evaluate` wrote, or of a file that `write` wrote.

    Raises:
        EvaluationError: it holds no runs.
    """
    if not path.exists():
        raise EvaluationError(
            f"{path}: there is no such file or folder; give the --output folder of cor-vllm evaluate"
        )
    found = _of_folder(path) if path.is_dir() else _of_file(path)
    if not found:
        raise EvaluationError(f"{path}: holds no result of cor-vllm evaluate; give its --output folder")
    return found


def _of_folder(folder: Path) -> list[Run]:
    return [runs.load(path) for path in sorted(folder.glob("*.json"))]


def _of_file(path: Path) -> list[Run]:
    """A file has the items and what the rows are to each other; the rest of a Run is empty."""
    found: dict[str, Run] = {}
    try:
        with lzma.open(path, "rt", encoding="utf-8", newline="") as lines:
            for line in map(Line.model_validate, csv.DictReader(lines)):
                if line.condition not in found:
                    found[line.condition] = Run(
                        condition=line.condition, control_of=line.control_of or None,
                        draw_of=line.draw_of or None, static=line.static, model=line.model,
                        backend=line.backend, description="", key="", settings={}, versions={},
                    )  # fmt: skip
                columns = found[line.condition].benchmarks
                if line.benchmark not in columns:
                    columns[line.benchmark] = Column(metric="", items={}, tokens=0, seconds=None)
                columns[line.benchmark].items.setdefault(line.quantity, {})[line.item] = line.value
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError, csv.Error, ValidationError) as error:
        raise EvaluationError(f"{path}: not a file of cor-vllm report --pack ({cause(error)})") from None
    return list(found.values())


def write(path: Path, found: Sequence[Run]) -> None:
    """One line for each condition, benchmark, quantity and item, values to 4 decimals.

    Args:
        path: where to; overwritten.
        found: the runs.
    """
    with lzma.open(path, "wt", encoding="utf-8", newline="", preset=9) as lines:
        writer = csv.writer(lines)
        writer.writerow(Line.model_fields)
        for run in found:
            row = [run.condition, run.control_of or "", run.draw_of or "", int(run.static)]
            for name, column in run.benchmarks.items():
                for quantity, items in column.items.items():
                    of = [*row, run.model, run.backend, name, quantity]
                    writer.writerows([*of, item, f"{value:.4f}"] for item, value in items.items())


def without(found: Sequence[Run], seen: Sequence[Run]) -> list[Run]:
    """The runs less the items that others have.

    Args:
        found: what is kept in part; a benchmark of which nothing is left goes.
        seen: whose items are left out.

    Raises:
        EvaluationError: nothing is left.
    """
    items = {
        item
        for run in seen
        for column in run.benchmarks.values()
        for values in column.items.values()
        for item in values
    }
    left = []
    for run in found:
        columns = {name: _less(column, items) for name, column in run.benchmarks.items()}
        kept = {name: column for name, column in columns.items() if "score" in column.items}
        left.append(run.model_copy(update={"benchmarks": kept}))
    if not any(run.benchmarks for run in left):
        raise EvaluationError("--without leaves no item: it has them all")
    return left


def _less(column: Column, items: set[str]) -> Column:
    kept = {
        quantity: {item: value for item, value in values.items() if item not in items}
        for quantity, values in column.items.items()
    }
    return column.model_copy(
        update={
            "items": {quantity: values for quantity, values in kept.items() if values},
            "cut": [item for item in column.cut if item not in items],
        }
    )
