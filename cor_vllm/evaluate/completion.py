"""A row of the table from what is there to what is missing: kept, measured, saved, benchmark by benchmark."""

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from cor_vllm.evaluate import acts, runs
from cor_vllm.evaluate.benchmarks import Benchmark, EvaluationError
from cor_vllm.evaluate.conditions import Condition
from cor_vllm.evaluate.harness import canary, measure
from cor_vllm.evaluate.options import Backend, EvaluateOptions, read_overlay, scores_path
from cor_vllm.evaluate.runs import Run
from cor_vllm.evaluate.verdict import chat_note, cut_note
from cor_vllm.version import __version__

Tasks = Mapping[Benchmark, dict[str, Any]]
"""benchmark → the harness's task objects"""


def new_run(
    options: EvaluateOptions, condition: Condition, backend: Backend, settings: dict[str, Any]
) -> Run:
    """An empty run; everything that decides its numbers is in its settings."""
    settings = {
        "model": options.model,
        "backend": backend,
        "options": condition.options,
        "scores": _digest(options, condition),
        "limit": options.limit,
        "seed": options.seed,
        "gate": acts.GATES.get(condition.act),
        **settings,
    }
    overlay = None if condition.router is None else read_overlay(options)
    if overlay is not None:  # the key of a run with the model's own router is that of before
        settings["router"] = overlay.fingerprint
    return Run(
        condition=condition.name,
        description=condition.description,
        control_of=condition.control_of,
        draw_of=condition.draw_of,
        static=condition.static,
        key=runs.key_of({**settings, "condition": condition.name}),
        model=Path(options.model).name if Path(options.model).exists() else options.model,
        backend=backend,
        settings=settings,
        versions=_versions(backend),
    )


def _digest(options: EvaluateOptions, condition: Condition) -> str | None:
    if condition.options is None:
        return None
    return hashlib.sha256(scores_path(options, condition).read_bytes()).hexdigest()


def _versions(backend: Backend) -> dict[str, str]:
    import lm_eval
    import torch
    import transformers

    from cor_vllm.serve import compat

    found = {"cor-vllm": __version__, "lm_eval": lm_eval.__version__, "torch": torch.__version__}
    if backend == "transformers":
        return {**found, "transformers": transformers.__version__}
    return {**found, **compat.versions()} if backend == "vllm" else found


def ready(lm: Any, where: str, options: EvaluateOptions, console: Console) -> list[str]:
    """Check a model that was just opened; what is to be noted of it, also on the console."""
    canary(lm, where)
    note = chat_note(options.model, lm.tokenizer)
    if note:
        console.print(f"warning: {note}", highlight=False, markup=False)
    return [note] if note else []


def complete(
    options: EvaluateOptions,
    benchmarks: Tasks,
    run: Run,
    open_model: Callable[[], tuple[Any, list[str]]],
    console: Console,
    unchanged: Callable[[], None] = lambda: None,
) -> Run:
    """Fill a run with the benchmarks that it lacks; the model is opened only if there are any.

    Args:
        options: what to do.
        benchmarks: all of the table.
        run: fresh; an earlier one of the same key is gone on with.
        open_model: gives the harness's model and the notes on it.
        console: where progress goes.
        unchanged: raises if the model has become another one; called before results are kept.

    Raises:
        EvaluationError: it cannot be measured.
    """
    run = runs.resumed(options.output, run)
    missing = {b: tasks for b, tasks in benchmarks.items() if b.task not in run.benchmarks}
    if not missing:
        console.print(f"{run.condition}: there already", highlight=False)
        return run
    lm, run.notes = open_model()
    cache = options.output / "cache"
    cache.mkdir(exist_ok=True)
    for benchmark, tasks in missing.items():
        name = benchmark.task
        kept = cache / f"{run.condition}-{name}-{run.key[:12]}"
        goes_on = any(cache.glob(f"{kept.name}*"))
        column = _measured(options, lm, benchmark, tasks, kept)
        try:
            unchanged()
        except EvaluationError:
            _forget(kept)  # answers of two models
            raise
        took = f"{column.seconds:.0f} s"
        if goes_on:
            column = column.model_copy(update={"seconds": None})
        run.benchmarks[name] = column
        runs.save(options.output, run)
        _forget(kept)
        scores = column.items["score"].values()
        console.print(
            f"{run.condition}: {name} {sum(scores) / len(scores):.4f} ({len(scores)} items, {took})",
            highlight=False,
        )
        if note := cut_note(run, name):
            console.print(f"warning: {run.condition}: {note}", highlight=False, markup=False)
    return run


def _measured(
    options: EvaluateOptions, lm: Any, benchmark: Benchmark, tasks: dict[str, Any], kept: Path
) -> runs.Column:
    try:
        for file in kept.parent.glob(f"{kept.name}*.db"):
            with contextlib.closing(sqlite3.connect(file)) as answers:
                answers.execute("PRAGMA schema_version")  # here: the harness reads it in a thread of its own
        return measure(lm, benchmark, tasks, options.limit, options.seed, str(kept))
    except sqlite3.Error as error:
        raise EvaluationError(
            f"{kept.parent}: the answers of an interrupted run cannot be read or written ({error}); is the "
            f"disk full? Otherwise delete {kept.name}*"
        ) from error


def _forget(kept: Path) -> None:
    for file in kept.parent.glob(f"{kept.name}*"):
        file.unlink()
