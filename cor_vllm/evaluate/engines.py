"""The rows that vLLM measures in this machine: one engine per condition, in a process of its own."""

import contextlib
import dataclasses
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from rich.console import Console

from cor_vllm import scores as scores_file
from cor_vllm.commands import exits, lifetime
from cor_vllm.errors import CorError, cause
from cor_vllm.evaluate.benchmarks import EvaluationError, chosen, load_task
from cor_vllm.evaluate.claims import Claim, check
from cor_vllm.evaluate.completion import complete, new_run, ready
from cor_vllm.evaluate.conditions import Condition, Sources
from cor_vllm.evaluate.harness import engine_model, quiet
from cor_vllm.evaluate.options import EvaluateOptions, read_overlay, read_sources, scores_path
from cor_vllm.evaluate.overlays import router_of, router_path
from cor_vllm.live.state import combine
from cor_vllm.overlay import RouterOverlay
from cor_vllm.serve.config import RoutingOptions, disabled, plan


def check_enabled(conditions: list[Condition]) -> None:
    """Refuse to call a row counterfactual routing if the plugin is switched off.

    Raises:
        EvaluationError: COR_DISABLE is set.
    """
    names = [each.name for each in conditions if each.options is not None or each.router is not None]
    if names and disabled():
        raise EvaluationError(
            f"COR_DISABLE is set, under which {', '.join(names)} would be stock routing: unset it"
        )


def in_own_process(options: EvaluateOptions, condition: Condition) -> None:
    """Measure a condition in a process of its own: vLLM gives its memory back only when its process ends.

    Raises:
        EvaluationError: it failed; the reason that the process gave.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_engine_main, args=(options, condition, sender))
    with _deaf_to_the_terminal():
        child.start()
    sender.close()
    try:
        child.join()
    except BaseException:
        assert child.pid is not None, "it was started"
        lifetime.end_tree(child.pid)
        child.join()
        raise
    if child.exitcode:
        try:
            reason = receiver.recv()
        except EOFError:
            reason = f"its process ended with exit code {child.exitcode}, see above"
        raise EvaluationError(f"{condition.name}: {reason}; the same command goes on from here")


@contextlib.contextmanager
def _deaf_to_the_terminal() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal: those started here leave the answer to this one.

    They would each print a traceback; this one ends them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _engine_main(options: EvaluateOptions, condition: Condition, reasons: Connection) -> None:
    lifetime.guard()
    try:
        _measure(options, condition)
    except CorError as error:
        reasons.send(str(error))
        sys.exit(1)
    except Exception as error:  # of vLLM, the harness, the system: the parent says it in one line, and fails
        exits.print_traceback(error)
        reasons.send(f"its engine failed ({cause(error)})")
        sys.exit(1)


def _measure(options: EvaluateOptions, condition: Condition) -> None:
    sources = read_sources(options)
    from cor_vllm import register

    register()
    quiet()
    console = Console(stderr=True)
    benchmarks = {benchmark: load_task(benchmark, options.data) for benchmark in chosen(options.tasks)}
    run = new_run(options, condition, "vllm", {"engine": options.engine, "dtype": options.dtype})
    run.activations = _activations(condition, sources, read_overlay(options))
    arguments = {"dtype": options.dtype, "seed": options.seed, **options.engine}
    if options.max_model_len is not None:
        arguments["max_model_len"] = options.max_model_len

    def open_model() -> tuple[Any, list[str]]:
        served, claim = _served(options, sources, condition)
        lm = engine_model(options.model, served, arguments)
        check_routing(lm, condition.name, claim)
        return lm, ready(lm, condition.name, options, console)

    complete(options, benchmarks, run, open_model, console)


def check_routing(lm: Any, name: str, claim: Claim) -> None:
    """Ask the workers of an engine how they route.

    Args:
        lm: harness.engine_model.
        name: the row's.
        claim: what it stands for.

    Raises:
        EvaluationError: it is not what the row is called.
    """
    if not hasattr(lm, "model"):
        return  # data parallel by the harness: there is an engine only while a benchmark runs
    options = (lm.model.llm_engine.vllm_config.additional_config or {}).get("cor")
    state = None if options is None else combine([lm.model.collective_rpc("cor_status")])
    check("the engine", name, claim, state)


def _served(
    options: EvaluateOptions, sources: Sources, condition: Condition
) -> tuple[dict[str, Any] | None, Claim]:
    """`additional_config["cor"]`, with the condition's own files, and what the engine then has to say."""
    served: dict[str, Any] = {}
    claim = Claim(condition.options)
    if condition.options is not None:
        path, scores = scores_path(options, condition), sources[condition.source]
        if condition.change is not None:
            path, scores = options.output / f"{condition.name}.safetensors", condition.change(scores)
            scores_file.save(path, scores)
        sha256 = scores_file.digest(scores_file.read_bytes(path))
        served = {"scores": str(path), **condition.options}
        claim = Claim(condition.options, scores, sha256)
    overlay = router_of(options, condition)
    if overlay is not None:
        served["router"] = str(router_path(options, condition, overlay))
        claim = dataclasses.replace(claim, router=overlay.fingerprint)
    return served or None, claim


def _activations(condition: Condition, sources: Sources, overlay: RouterOverlay | None) -> float | None:
    """Routed experts per token, over all layers; None if no file says how many layers have experts."""
    scores = sources.get(condition.source)
    if condition.options is not None and scores is not None:
        config = RoutingOptions.of(condition.options).resolved(scores.config.serving)
        return float(sum(layer.top_k for layer in plan(config, scores).values()))
    if scores is not None:
        return float(scores.config.model.top_k * scores.num_layers)
    model = None if overlay is None else overlay.config.model
    return None if model is None or model.routers is None else float(model.top_k * len(model.routers))
