"""Checks of the routing kernel that need a GPU: CUDA graphs, and when Triton compiles."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.common.graphs import capture
from benchmarks.common.routing_cases import NEEDS_GPU, PASSED, Case, Inputs, difference, kernel


def run(device: str) -> Iterator[tuple[str, str]]:
    """Run each check; yields its name and result."""
    checks: dict[str, Callable[[], str]] = {
        "k = 1 … 16 in one captured graph": all_k_in_one_graph,
        "bias changed in place between replays": bias_in_place,
        "no compilation when T or the scale changes": no_recompilation,
    }
    for name, check in checks.items():
        yield name, (check() or PASSED) if device == "cuda" else NEEDS_GPU


def all_k_in_one_graph() -> str:
    """Capture a model's layers, each with another k, in one graph; a replay must follow new logits."""
    graph_cases = [Case(64, 128, k) for k in range(1, 17)]
    inputs = Inputs.of(graph_cases[0], "cuda")
    results: list[Any] = []

    def work() -> None:
        results[:] = [kernel(case, inputs) for case in graph_cases]

    graph = capture(work)
    for seed in (1, 2):
        inputs.logits.copy_(Inputs.of(graph_cases[0], "cuda", seed).logits)
        graph.replay()
        torch.cuda.synchronize()
        for case, result in zip(graph_cases, results, strict=True):
            if wrong := difference(case, inputs, *result):
                return f"k={case.top_k}: {wrong}"
    return ""


def bias_in_place() -> str:
    """λ·CEI is in a buffer that a graph reads at every replay, so another λ must change the selection."""
    case = Case(256, 128, 8)
    inputs = Inputs.of(case, "cuda")
    assert inputs.bias is not None
    results: list[torch.Tensor] = []

    def work() -> None:
        results[:] = kernel(case, inputs)

    graph = capture(work)
    seen = []
    for factor in (1.0, 10.0, 0.0):
        inputs.bias.copy_(torch.rand_like(inputs.bias) * 0.1 * factor)
        graph.replay()
        torch.cuda.synchronize()
        if wrong := difference(case, inputs, *results):
            return f"bias times {factor}: {wrong}"
        seen.append(results[1].clone())
    return "the selection did not follow" if torch.equal(seen[0], seen[1]) else ""


def no_recompilation() -> str:
    """Servers meet every T, and a compilation would stop them for a second."""
    for tokens in (1, 1000):
        kernel(Case(tokens, 128, 8), Inputs.of(Case(tokens, 128, 8), "cuda"))
    with compilations() as compiled:
        for tokens in (2, 3, 15, 16, 17, 255, 256, 264, 265, 300, 1024, 4096):
            for scale in (1.0, 2.5):
                case = Case(tokens, 128, 8, scale=scale)
                kernel(case, Inputs.of(case, "cuda"))
        torch.cuda.synchronize()
    return f"compiled {len(compiled)} times: {compiled[:3]}" if compiled else ""


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects the names of the kernels that Triton compiles meanwhile."""
    from triton import knobs

    names: list[str] = []
    before = knobs.runtime.jit_post_compile_hook

    def note(**event: Any) -> None:  # what is in an event differs between versions of Triton
        names.append(getattr(event.get("fn"), "name", "?"))

    knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = before
