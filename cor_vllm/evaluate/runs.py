"""What a condition scored: one JSON file per run, written benchmark by benchmark, so that it can go on."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cor_vllm.errors import cause
from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.evaluate.items import Items

FORMAT = "cor-evaluation/1"


class Column(BaseModel):
    """One benchmark of a run."""

    metric: str
    items: Items
    tokens: int  # read by the model for it
    seconds: float | None  # of evaluation alone; None: a part came from an interrupted run, at no cost
    chance: float | None = None  # the score of guessing, 0 to 1; None: not a choice, or a run of before
    max_model_len: int | None = None  # tokens of a prompt and its answer; None: a run of before
    cut: list[str] = []  # items whose prompt was longer and lost its beginning


class Run(BaseModel):
    """One condition on every benchmark so far."""

    model_config = ConfigDict(extra="forbid")

    format: str = FORMAT
    condition: str
    description: str
    # What it is to other rows (conditions.Condition); a run of before says nothing of it.
    control_of: str | None = None
    draw_of: str | None = None
    static: bool = False
    key: str  # hash of everything that decides the numbers
    model: str
    backend: str
    settings: dict[str, Any]
    activations: float | None = None  # routed experts per token, summed over the layers
    slots_changed: float | None = None  # 0 to 1, of the slots that this condition filled
    versions: dict[str, str]
    notes: list[str] = []  # what a reader of the numbers must know
    benchmarks: dict[str, Column] = {}


def key_of(settings: dict[str, Any]) -> str:
    """Hash of what decides a run's numbers: two runs of one key can stand in for each other."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def path_of(folder: Path, condition: str) -> Path:
    """Where a condition's run is kept."""
    return folder / f"{condition}.json"


def save(folder: Path, run: Run) -> None:
    """Write a run atomically."""
    path = path_of(folder, run.condition)
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(run.model_dump_json(indent=1), encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def load(path: Path) -> Run:
    """Read a run; EvaluationError if the file is not one."""
    try:
        return Run.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: not a result of this version ({cause(error)}); delete it") from None


def resumed(folder: Path, fresh: Run) -> Run:
    """What is kept of an earlier run of the same condition, or `fresh`.

    Raises:
        EvaluationError: a run of this condition is there that was made otherwise.
    """
    path = path_of(folder, fresh.condition)
    if not path.exists():
        return fresh
    earlier = load(path)
    if earlier.key == fresh.key:
        return earlier
    changed = sorted(
        name
        for name in earlier.settings.keys() | fresh.settings.keys()
        if earlier.settings.get(name) != fresh.settings.get(name)
    )
    raise EvaluationError(
        f"{path}: a result made with another {', '.join(changed) or 'version'}; give another --output, or "
        "delete it"
    )
