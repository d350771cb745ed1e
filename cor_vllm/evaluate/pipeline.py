"""`cor-vllm evaluate`: every condition on every benchmark, one result file each, then the table."""

import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.request import Request, urlopen

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from cor_vllm import __version__
from cor_vllm import scores as scores_file
from cor_vllm.evaluate import runs
from cor_vllm.evaluate.benchmarks import Benchmark, EvaluationError, chosen, load_task
from cor_vllm.evaluate.conditions import PERMUTATIONS, Condition, Sources, select, table
from cor_vllm.evaluate.harness import canary, engine_model, measure, server_model
from cor_vllm.evaluate.runs import Run

Backend = Literal["vllm", "transformers", "server"]


class EvaluateOptions(BaseModel):
    """Every option of `cor-vllm evaluate`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    output: Path
    scores: Path | None = None
    also: dict[str, Path] = {}
    servers: dict[str, str] = {}
    served_name: str | None = None
    backend: Backend = "vllm"
    tasks: tuple[str, ...] = ("factual",)
    conditions: tuple[str, ...] = ("quick",)
    data: Path | None = None
    limit: int | None = Field(default=None, ge=1)
    permutations: int = Field(default=PERMUTATIONS, ge=1)
    lambda_: float | None = Field(default=None, ge=0)
    batch_size: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**31)
    dtype: str = "auto"
    device: str | None = None
    engine: dict[str, Any] = {}


def available(options: EvaluateOptions) -> list[Condition]:
    """Every condition that these scores files have."""
    sources = _read_sources(options)
    return table(sources, _lambda(options, sources), options.permutations)


def evaluate(
    options: EvaluateOptions, console: Console, rows: Sequence[Condition] | None = None
) -> list[Run]:
    """Run what is not there yet and return all runs of the table, in its order.

    Args:
        options: what to do.
        console: where progress goes.
        rows: conditions in place of those that the options name.

    Raises:
        EvaluationError, ScoresError, CalibrationError: one line with the cause and the remedy.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    _quiet()
    benchmarks = {benchmark: load_task(benchmark, options.data) for benchmark in chosen(options.tasks)}
    if options.servers:
        return [_of_server(options, benchmarks, name, url, console) for name, url in options.servers.items()]
    sources = _read_sources(options)
    wanted = list(rows) if rows else _wanted(options, console)
    if options.backend == "transformers":
        return _in_transformers(options, benchmarks, sources, wanted, console)
    for i, condition in enumerate(wanted):
        console.print(
            f"{i + 1} of {len(wanted)}: {condition.name} ({condition.description})", highlight=False
        )
        _in_own_process(options, condition)
    return [runs.load(runs.path_of(options.output, condition.name)) for condition in wanted]


def _wanted(options: EvaluateOptions, console: Console) -> list[Condition]:
    chosen_rows = select(available(options), options.conditions)
    impossible = [row.name for row in chosen_rows if row.transformers_only]
    if options.backend == "transformers" or not impossible:
        return chosen_rows
    remedy = "only transformers can do them: --backend transformers"
    if named := set(impossible) & set(options.conditions):
        raise EvaluationError(f"--conditions {', '.join(sorted(named))}: {remedy}")
    console.print(f"left out: {', '.join(impossible)}; {remedy}", highlight=False)
    return [row for row in chosen_rows if not row.transformers_only]


def _quiet() -> None:
    import logging

    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _read_sources(options: EvaluateOptions) -> Sources:
    if options.scores is None:
        raise EvaluationError("give --cor-scores FILE, or --server NAME=URL for servers that run already")
    files = {"": options.scores, **options.also}
    return Sources({name: scores_file.load(path) for name, path in files.items()})


def _lambda(options: EvaluateOptions, sources: Sources) -> float:
    return sources.scores[""].config.serving.lambda_ if options.lambda_ is None else options.lambda_


Measure = Callable[[Benchmark, dict[str, Any]], runs.Column]


def _complete(
    options: EvaluateOptions,
    benchmarks: dict[Benchmark, dict[str, Any]],
    run: Run,
    open_model: Callable[[], Any],
    console: Console,
) -> Run:
    """Fill a run with the benchmarks that it lacks; the model is opened only where there are any."""
    run = runs.resumed(options.output, run)
    missing = {b: tasks for b, tasks in benchmarks.items() if b.task not in run.benchmarks}
    if not missing:
        console.print(f"{run.condition}: there already", highlight=False)
        return run
    lm = open_model()
    cache = options.output / "cache"
    cache.mkdir(exist_ok=True)
    for benchmark, tasks in missing.items():
        name = benchmark.task
        kept = cache / f"{run.condition}-{name}-{run.key[:12]}"
        goes_on = any(cache.glob(f"{kept.name}*"))
        column = measure(lm, benchmark, tasks, options.limit, options.seed, str(kept))
        took = f"{column.seconds:.0f} s"
        if goes_on:
            column = column.model_copy(update={"seconds": None})
        run.benchmarks[name] = column
        runs.save(options.output, run)
        for file in cache.glob(f"{kept.name}*"):
            file.unlink()
        scores = column.items["score"].values()
        console.print(
            f"{run.condition}: {name} {sum(scores) / len(scores):.4f} ({len(scores)} items, {took})",
            highlight=False,
        )
    return run


def _new_run(
    options: EvaluateOptions, condition: Condition, backend: Backend, settings: dict[str, Any]
) -> Run:
    settings = {
        "model": options.model,
        "backend": backend,
        "options": condition.options,
        "scores": _digest(options, condition),
        "limit": options.limit,
        "seed": options.seed,
        "gate": condition.gate,
        **settings,
    }
    return Run(
        condition=condition.name,
        description=condition.description,
        key=runs.key_of({**settings, "condition": condition.name}),
        model=Path(options.model).name if Path(options.model).exists() else options.model,
        backend=backend,
        settings=settings,
        versions=_versions(backend),
    )


def _digest(options: EvaluateOptions, condition: Condition) -> str | None:
    if condition.options is None:
        return None
    return hashlib.sha256(_scores_path(options, condition).read_bytes()).hexdigest()


def _scores_path(options: EvaluateOptions, condition: Condition) -> Path:
    path = options.also[condition.source] if condition.source else options.scores
    assert path is not None, "a condition with options has scores"
    return path


def _versions(backend: Backend) -> dict[str, str]:
    import lm_eval
    import torch
    import transformers

    from cor_vllm import compat

    found = {"cor-vllm": __version__, "lm_eval": lm_eval.__version__, "torch": torch.__version__}
    if backend == "transformers":
        return {**found, "transformers": transformers.__version__}
    return {**found, **compat.versions()} if backend == "vllm" else found


def _of_server(
    options: EvaluateOptions,
    benchmarks: dict[Benchmark, dict[str, Any]],
    name: str,
    url: str,
    console: Console,
) -> Run:
    served = options.served_name or _served_name(url)
    condition = Condition(name, f"server {name}")
    run = _new_run(options, condition, "server", {"cor": _routing_of(url), "served_name": served})

    def open_model() -> Any:
        lm = server_model(options.model, url, served, options.batch_size)
        canary(lm, f"server {name} ({url})")
        return lm

    return _complete(options, benchmarks, run, open_model, console)


def _served_name(url: str) -> str:
    """What the server calls its first model."""
    try:
        return str(_get(url, "models")["data"][0]["id"])
    except (OSError, ValueError, LookupError) as error:
        raise EvaluationError(
            f"{url}: does not say which models it has ({error}); is the server up, and is this its address?"
        ) from None


def _routing_of(url: str) -> Any:
    """What the server says about its routing, for the record; None: stock vLLM or another server."""
    try:
        return _get(url, "cor")
    except (OSError, ValueError):
        return None


def _get(url: str, what: str) -> Any:
    key = os.environ.get("OPENAI_API_KEY")
    request = Request(
        f"{url.rstrip('/').removesuffix('/v1')}/v1/{what}",
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )
    with urlopen(request, timeout=30) as answer:
        return json.load(answer)


def _in_own_process(options: EvaluateOptions, condition: Condition) -> None:
    """One engine per process: vLLM gives its memory back only when its process ends."""
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_engine_main, args=(options, condition))
    child.start()
    try:
        child.join()
    except KeyboardInterrupt:
        child.terminate()
        child.join()
        raise
    if child.exitcode:
        raise EvaluationError(
            f"{condition.name}: its engine failed (exit code {child.exitcode}, see above); the same command "
            "goes on from here"
        )


def _engine_main(options: EvaluateOptions, condition: Condition) -> None:
    from cor_vllm import register

    register()
    _quiet()
    try:
        sources = _read_sources(options)
        benchmarks = {benchmark: load_task(benchmark, options.data) for benchmark in chosen(options.tasks)}
        run = _new_run(options, condition, "vllm", {"engine": options.engine, "dtype": options.dtype})
        run.activations = _activations(condition, sources)

        def open_model() -> Any:
            lm = engine_model(options.model, _served(options, sources, condition),
                              {"dtype": options.dtype, "seed": options.seed, **options.engine})  # fmt: skip
            canary(lm, condition.name)
            return lm

        _complete(options, benchmarks, run, open_model, Console(stderr=True))
    except EvaluationError as error:
        print(f"cor-vllm: error: {error}", file=sys.stderr)
        sys.exit(1)


def _served(options: EvaluateOptions, sources: Sources, condition: Condition) -> dict[str, Any] | None:
    """`additional_config["cor"]`, with the condition's own scores file where it changes the scores."""
    if condition.options is None:
        return None
    path = _scores_path(options, condition)
    if condition.change is not None:
        path = options.output / f"{condition.name}.safetensors"
        scores_file.save(path, condition.change(sources.scores[condition.source]))
    return {"scores": str(path), **condition.options}


def _activations(condition: Condition, sources: Sources) -> float:
    from cor_vllm.config import CorConfig, plan

    scores = sources.scores[condition.source]
    if condition.options is None:
        return float(scores.config.model.top_k * scores.num_layers)
    config = CorConfig.of({"scores": "-", **condition.options}).resolved(scores.config.serving)
    return float(sum(layer.top_k for layer in plan(config, scores).values()))


def _in_transformers(
    options: EvaluateOptions,
    benchmarks: dict[Benchmark, dict[str, Any]],
    sources: Sources,
    wanted: Sequence[Condition],
    console: Console,
) -> list[Run]:
    from transformers import AutoTokenizer

    from cor_vllm.calibrate.loading import load_model, model_folder
    from cor_vllm.evaluate.harness import transformers_model
    from cor_vllm.evaluate.interventions import Interventions

    folder, _ = model_folder(options.model)
    model = load_model(folder, options.dtype, options.device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = transformers_model(model, tokenizer, options.batch_size)
    canary(lm, options.model)
    interventions = Interventions(model, tokenizer, options.data, options.seed)
    finished = []
    for i, condition in enumerate(wanted):
        console.print(
            f"{i + 1} of {len(wanted)}: {condition.name} ({condition.description})", highlight=False
        )
        run = _new_run(options, condition, "transformers", {"dtype": str(model.model.dtype)})

        with interventions.applied(condition, sources, lm) as applied:
            run.activations = applied.activations
            run = _complete(options, benchmarks, run, lambda: lm, console)
            if applied.slots.total:
                run.slots_changed = applied.slots.share
                runs.save(options.output, run)
        finished.append(run)
    return finished
