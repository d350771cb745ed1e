"""Times short GPU work by replaying a CUDA graph of many calls."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Call = Callable[[int], object]  # takes the number of the input set


class Timer(Protocol):
    """Something prepared that can be timed again and again."""

    def seconds(self) -> float:
        """Seconds per call."""
        ...


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Record `work` as a graph. It runs twice before, so that nothing is compiled during the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


class GraphTimer:
    """`calls` calls in one graph, over `sets` input sets in turn: no input is warm from the last call.

    Outputs that a call allocates come from the graph's own pool: at replay an allocation costs nothing.
    """

    REPLAYS = 5

    def __init__(self, call: Call, sets: int, calls: int) -> None:
        self.calls = calls
        self.graph = capture(lambda: [call(i % sets) for i in range(calls)])

    def seconds(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.graph.replay()
        start.record()
        for _ in range(self.REPLAYS):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (self.calls * self.REPLAYS)


class LoopTimer:
    """Times calls in a loop, without a GPU, to try out a program; its times mean little."""

    def __init__(self, call: Call, sets: int, calls: int) -> None:
        self.call, self.sets, self.calls = call, sets, calls

    def seconds(self) -> float:
        start = time.perf_counter()
        for i in range(self.calls):
            self.call(i % self.sets)
        return (time.perf_counter() - start) / self.calls


def timer(call: Call, sets: int, calls: int, device: str) -> Timer:
    """The timer for the device."""
    return GraphTimer(call, sets, calls) if device == "cuda" else LoopTimer(call, sets, calls)


def alternate(timers: dict[str, Timer], rounds: int) -> dict[str, list[float]]:
    """Measure seconds per call in each round; every other round goes backwards."""
    measured: dict[str, list[float]] = {name: [] for name in timers}
    names: Sequence[str] = list(timers)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            measured[name].append(timers[name].seconds())
    return measured
