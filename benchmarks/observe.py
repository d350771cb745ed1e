"""Measures what --cor-observe costs on this machine's CPU: one engine counts and does not count, in turns.

    python -m benchmarks.observe SCORES [--rounds 12]

A round is one batch of prompts, then decoding, by the demo model in eager mode. In so tiny a model routing is
a large share of the work. Each round measures not counting twice: the ratio of those two is the noise. The
figure is CPU time on one thread, which other work on the machine disturbs least.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.update(OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind")

MODEL = Path(__file__).parents[1] / "examples/demo/model"
WORK = {"prefill": (16, 400, 1), "decode": (16, 4, 64)}  # requests, prompt tokens, new tokens


def engine(scores: str) -> Any:
    from vllm import LLM

    return LLM(
        model=str(MODEL),
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        enable_prefix_caching=False,
        additional_config={"cor": {"scores": scores, "observe": True}},
    )


def routers(llm: Any) -> list[Any]:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    return [m.router for m in worker.get_model().modules() if type(m).__name__ == "MoERunner"]


def seconds(llm: Any, work: str) -> float:
    from vllm import SamplingParams

    requests, prompt, new = WORK[work]
    inputs = [{"prompt_token_ids": [(7 * i + 3 * j) % 4000 for j in range(prompt)]} for i in range(requests)]
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    start = time.process_time()
    llm.generate(inputs, params, use_tqdm=False)
    return time.process_time() - start


def measure(llm: Any, work: str, rounds: int) -> None:
    """Print the ratio of time with counting to time without, and of time without to itself.

    Of the fastest rounds, since other work only ever adds time, and the median over rounds.
    """
    layers = routers(llm)
    buffers = [router.counts for router in layers]

    def once(counting: bool) -> float:
        for router, buffer in zip(layers, buffers, strict=True):
            router.counts = buffer if counting else None
        return seconds(llm, work)

    once(True)
    once(False)
    took: dict[str, list[float]] = {"on": [], "a": [], "b": []}
    for number in range(rounds):
        # The order turns, so that a slow drift of the machine favours neither.
        names = list(took)
        for name in names[number % 3 :] + names[: number % 3]:
            took[name].append(once(name == "on"))
    for what, mine, others in (("counting / not", "on", "a"), ("not / not", "b", "a")):
        ratios = [x / y for x, y in zip(took[mine], took[others], strict=True)]
        print(
            f"{work:8} {what:15} fastest {min(took[mine]) / min(took[others]):.3f}, "
            f"median {statistics.median(ratios):.3f}"
        )


def measure_layer(llm: Any, tokens: int, rounds: int) -> None:
    """Print a layer's routing step in microseconds, the fastest of many, without and with counting."""
    import torch

    router = routers(llm)[0]
    buffer = router.counts
    logits = torch.randn(tokens, router.num_experts)
    fastest = {}
    for counting in (False, True):
        router.counts = buffer if counting else None
        took = []
        for _ in range(50 * rounds):
            start = time.perf_counter()
            router._compute_routing(logits, logits, torch.int32)
            took.append(time.perf_counter() - start)
        fastest[counting] = 1e6 * min(took)
    print(f"one layer, {tokens} tokens: {fastest[False]:.0f} µs, counting {fastest[True]:.0f} µs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scores", help="a scores file of the demo model")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    llm = engine(options.scores)
    for tokens in (1, 16, 2048):
        measure_layer(llm, tokens, options.rounds)
    for work in WORK:
        measure(llm, work, options.rounds)
    print(f"{options.rounds} rounds, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
