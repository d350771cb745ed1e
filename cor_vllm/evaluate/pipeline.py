"""`cor-vllm evaluate`: every condition on every benchmark, one result file each, then the table."""

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from rich.console import Console

from cor_vllm.evaluate import runs
from cor_vllm.evaluate.benchmarks import EvaluationError, chosen, load_task
from cor_vllm.evaluate.completion import Tasks, complete, new_run, ready
from cor_vllm.evaluate.conditions import Condition, Rerouted, Sources, select
from cor_vllm.evaluate.engines import check_enabled, in_own_process
from cor_vllm.evaluate.harness import quiet, server_model
from cor_vllm.evaluate.options import EvaluateOptions, available, read_overlay, read_sources
from cor_vllm.evaluate.overlays import check_router, router_of
from cor_vllm.evaluate.prompts import resolve_limit
from cor_vllm.evaluate.runs import Run
from cor_vllm.evaluate.servers import (
    Server,
    check_addresses,
    check_tokenizer,
    check_unchanged,
    claimed,
    look,
)
from cor_vllm.evaluate.verdict import check_same_prompts
from cor_vllm.serve.config import RoutingOptions, doubts


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
    if options.data is not None and not options.data.is_dir():
        raise EvaluationError(f"--data {options.data}: there is no such folder")
    if options.output.exists() and not options.output.is_dir():
        raise EvaluationError(f"--output {options.output}: a file of that name is there; give a folder")
    options.output.mkdir(parents=True, exist_ok=True)
    quiet()
    finished = _served(options, console) if options.servers else _in_process(options, console, rows)
    check_same_prompts(finished)
    return finished


def _in_process(options: EvaluateOptions, console: Console, rows: Sequence[Condition] | None) -> list[Run]:
    sources = read_sources(options)
    wanted = list(rows) if rows else _wanted(options, console)
    check_router(options)
    if options.backend == "vllm":
        check_enabled(wanted)
    for line in [*_doubts(wanted, sources), *_harm(options, wanted)]:
        console.print(f"warning: {line}", highlight=False)
    benchmarks = _benchmarks(options)
    if options.backend == "transformers":
        return _in_transformers(options, benchmarks, sources, wanted, console)
    for i, condition in enumerate(wanted):
        console.print(
            f"{i + 1} of {len(wanted)}: {condition.name} ({condition.description})", highlight=False
        )
        in_own_process(options, condition)
    return [runs.load(runs.path_of(options.output, condition.name)) for condition in wanted]


def _doubts(wanted: Sequence[Condition], sources: Sources) -> list[str]:
    """What a server would say at its start about the options of the rows, no line twice."""
    lines: list[str] = []
    for row in wanted:
        if row.options is not None:
            scores = sources[row.source]
            config = RoutingOptions.of(row.options).resolved(scores.config.serving)
            lines += doubts(config, scores)
    return list(dict.fromkeys(lines))


def _harm(options: EvaluateOptions, wanted: Sequence[Condition]) -> list[str]:
    """What the router file's own check says against it, if a row has its router."""
    overlay = read_overlay(options) if Rerouted() in {row.router for row in wanted} else None
    harm = None if overlay is None else overlay.config.harm()
    return [f"--cor-router {options.router}: {harm}"] if harm else []


def _benchmarks(options: EvaluateOptions) -> Tasks:
    return {benchmark: load_task(benchmark, options.data) for benchmark in chosen(options.tasks)}


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


def _served(options: EvaluateOptions, console: Console) -> list[Run]:
    """All servers are looked at before the first is measured."""
    check_addresses(options.servers)
    found = [look(name, url, options.model, options.served_name) for name, url in options.servers.items()]
    limits = [resolve_limit(each.max_model_len, options.max_model_len, each.where) for each in found]
    given = options.scores is not None or options.router is not None
    sources = read_sources(options) if given else {}
    rows = {row.name: row for row in available(options)} if given else {}
    files = {"": options.scores, **options.also} if options.scores is not None else {}
    router = functools.partial(router_of, options)
    conditions = [claimed(each, rows, sources, files, options.output, router) for each in found]
    for server, condition in zip(found, conditions, strict=True):
        console.print(f"{server.name}: {condition.description}", highlight=False, markup=False)
    benchmarks = _benchmarks(options)
    return [
        # The shortest one decides for all: the same prompts.
        _of_server(options, benchmarks, server, condition, min(limits), console)
        for server, condition in zip(found, conditions, strict=True)
    ]


def _of_server(
    options: EvaluateOptions,
    benchmarks: Tasks,
    server: Server,
    condition: Condition,
    limit: int,
    console: Console,
) -> Run:
    settings = {"cor": server.cor, "served_name": server.served_name, "max_model_len": limit}
    run = new_run(options, condition, "server", settings)

    def open_model() -> tuple[Any, list[str]]:
        lm = server_model(options.model, server.url, server.served_name, options.batch_size, limit)
        check_tokenizer(server, lm.tokenizer)
        return lm, ready(lm, server.where, options, console)

    def unchanged() -> None:
        check_unchanged(server, options.model, options.served_name)

    return complete(options, benchmarks, run, open_model, console, unchanged)


def _in_transformers(
    options: EvaluateOptions,
    benchmarks: Tasks,
    sources: Sources,
    wanted: Sequence[Condition],
    console: Console,
) -> list[Run]:
    from cor_vllm.calibrate.model.loading import load_model, load_tokenizer, model_folder
    from cor_vllm.evaluate.harness import transformers_model
    from cor_vllm.evaluate.interventions import Interventions
    from cor_vllm.evaluate.routing import replaced_router

    folder, _ = model_folder(options.model)
    tokenizer = load_tokenizer(str(folder))
    model = load_model(folder, options.dtype, options.device)
    lm = transformers_model(model, tokenizer, options.batch_size, options.max_model_len)
    notes = ready(lm, options.model, options, console)
    interventions = Interventions(model, tokenizer, options.data, options.seed)
    finished = []
    for i, condition in enumerate(wanted):
        console.print(
            f"{i + 1} of {len(wanted)}: {condition.name} ({condition.description})", highlight=False
        )
        settings = {"dtype": str(model.model.dtype), "max_model_len": lm.limit}
        run = new_run(options, condition, "transformers", settings)
        overlay = router_of(options, condition)
        with (
            replaced_router(model, overlay) if overlay is not None else nullcontext(),
            interventions.applied(condition, sources, lm) as applied,
        ):
            run.activations = applied.activations
            run = complete(options, benchmarks, run, lambda: (lm, notes), console)
            if applied.slots.total:
                run.slots_changed = applied.slots.share
                runs.save(options.output, run)
        finished.append(run)
    return finished
