"""Times the routing kernel against vLLM's op, plain torch and an empty launch, by CUDA graph replay.

    python -m benchmarks.kernel                      a GPU is needed for figures that mean anything
    python -m benchmarks.kernel --device cpu --quick tries the program out

The contestants alternate. The kernel is captured twice, and its ratio to itself is the noise of the other
ratios. The launch floor is an empty Triton kernel in the same harness. A second table goes through numbers of
rows per program and of warps, by which the choice in kernels/cor_topk.py can be judged.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.graphs import Call, alternate, timer
from benchmarks.common.ratios import Ratio, aim, paired
from benchmarks.common.results import device_name, markdown, run_folder, write_rows
from cor_vllm.kernels import reference
from cor_vllm.kernels.dispatch import route
from cor_vllm.kernels.scoring import Scoring

SHAPES = ((128, 8), (128, 12), (32, 4), (64, 6), (256, 8))
SIZES = (1, 16, 256, 4096, 16384)
SWEEP_SIZES = (64, 256, 512, 1024, 4096)
SCORING = Scoring("softmax", renormalize=True)
SETS = 8  # input sets in turn, 64 MiB at the largest shape: more than the L2 cache holds
SMALL = 1024  # below, 100 calls make one graph: the gap between two graphs must not show


class Inputs:
    """SETS logits [T, N] and one bias [N]."""

    def __init__(self, tokens: int, experts: int, top_k: int, device: str) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self.tokens, self.experts, self.top_k, self.device = tokens, experts, top_k, device
        logits = torch.randn(SETS, tokens, experts, generator=generator) * 2
        self.logits = list(logits.bfloat16().to(device))
        self.bias = (torch.rand(experts, generator=generator) * 0.01).to(device)
        self.calls = 100 if tokens <= SMALL else 20


def contestants(inputs: Inputs) -> dict[str, Call]:
    """What is compared: all have the same inputs, and each has outputs of its own."""
    logits, bias, k = inputs.logits, inputs.bias, inputs.top_k
    calls: dict[str, Call] = {
        "kernel": lambda i: route(logits[i], bias, k, SCORING),
        "kernel again": lambda i: route(logits[i], bias, k, SCORING),
        "torch": lambda i: reference.route(logits[i], bias, k, SCORING),
    }
    if inputs.device == "cuda":
        calls |= {"vllm": vllm_op(inputs), "floor": floor(min(inputs.tokens, 256))}
    return calls


def vllm_op(inputs: Inputs) -> Call:
    """vLLM's fused op as its own router calls it, outputs allocated at each call."""
    from vllm import _custom_ops as ops

    shape = (inputs.tokens, inputs.top_k)

    def call(i: int) -> object:
        weights = torch.empty(shape, dtype=torch.float32, device=inputs.device)
        ids = torch.empty(shape, dtype=torch.int32, device=inputs.device)
        rows = torch.empty(shape, dtype=torch.int32, device=inputs.device)
        ops.topk_softmax(weights, ids, rows, inputs.logits[i], True, inputs.bias)
        return weights, ids

    return call


def floor(programs: int) -> Call:
    """A launch that does nothing."""
    from benchmarks.common.empty_kernel import empty

    return lambda i: empty[(programs,)](num_warps=1)


def measure(inputs: Inputs, rounds: int) -> dict[str, Any]:
    """Measure one row of the table: microseconds (median, range) and ratios paired by round."""
    timers = {
        name: timer(call, SETS, inputs.calls, inputs.device) for name, call in contestants(inputs).items()
    }
    seconds = alternate(timers, rounds)
    row: dict[str, Any] = {"T": inputs.tokens, "N": inputs.experts, "k": inputs.top_k}
    for name in ("kernel", "vllm", "torch", "floor"):
        if name in seconds:
            micro = [value * 1e6 for value in seconds[name]]
            row[f"{name}, µs"] = statistics.median(micro)
            row[f"{name}, range"] = f"{min(micro):.3g} to {max(micro):.3g}"
    ratios = {"kernel / vllm": "vllm", "kernel / floor": "floor", "torch / kernel": "kernel"}
    for title, base in ratios.items():
        if base in seconds:
            row[title] = paired(seconds[title.split(" / ")[0]], seconds[base])
    return row | {"kernel / itself": paired(seconds["kernel again"], seconds["kernel"])}


def sweep(inputs: Inputs, rounds: int) -> dict[str, Any]:
    """Measure one row of the second table: microseconds for each number of rows per program and of warps."""
    from cor_vllm.kernels.cor_topk import route as launch

    def call(rows: int, warps: int) -> Call:
        return lambda i: launch(
            inputs.logits[i], inputs.bias, inputs.top_k, SCORING, rows=rows, num_warps=warps
        )

    timers = {
        f"{rows} rows, {warps} warps": timer(call(rows, warps), SETS, inputs.calls, inputs.device)
        for warps in (1, 4)
        for rows in (1, 2, 4, 8)
    }
    seconds = alternate(timers, rounds)
    medians = {name: statistics.median(values) * 1e6 for name, values in seconds.items()}
    best = min(medians, key=lambda name: medians[name])
    row = {"T": inputs.tokens, "N": inputs.experts, "k": inputs.top_k, "best": best}
    return row | {f"{name}, µs": value for name, value in medians.items()}


def aims(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The aims: at most vLLM's op in geometric mean, and within 1.5 × of the launch floor for T ≤ 256."""
    against = [row["kernel / vllm"].mean for row in rows if "kernel / vllm" in row]
    if not against:
        yield aim("kernel at most vLLM's op in geometric mean", "not measured", "needs a GPU")
        yield aim("kernel within 1.5 launch floors for T ≤ 256", "not measured", "needs a GPU")
        return
    # Over the shapes, which differ far more than the rounds of one: no interval, only the mean.
    mean = statistics.geometric_mean(against)
    noise = max(abs(row["kernel / itself"].mean - 1) for row in rows)
    verdict = "met" if mean <= 1 else "missed"
    yield aim("kernel at most vLLM's op in geometric mean", verdict,
              f"{mean:.3f} over {len(against)} shapes, {min(against):.2f} to {max(against):.2f}; "
              f"the kernel against itself is off by up to {noise:.1%}")  # fmt: skip
    small: dict[str, Ratio] = {
        f"T={r['T']} N={r['N']} k={r['k']}": r["kernel / floor"] for r in rows if r["T"] <= 256
    }
    worst = max(small, key=lambda shape: small[shape].mean)
    verdict = "met" if small[worst].mean <= 1.5 else "missed"
    yield aim("kernel within 1.5 launch floors for T ≤ 256", verdict, f"worst {worst}: {small[worst]}")


def warm_clocks() -> None:
    """Keep the GPU busy: an idle one takes a while to reach its clocks."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for _ in range(300):
        x @ x
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the CSV files (default: in results/)")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], help="where it runs (default: cuda if there is one)"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two sizes of one shape, and no sweep")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name, output = device_name(device), args.output or run_folder(device)
    if device == "cuda":
        warm_clocks()
    else:
        print("No GPU: torch routes in place of the kernel, so these figures only try out the program.\n")
    shapes, sizes = (SHAPES[:1], (1, 16)) if args.quick else (SHAPES, SIZES)
    rows = []
    for experts, top_k in shapes:
        for tokens in sizes:
            rows.append(measure(Inputs(tokens, experts, top_k, device), args.rounds))
            print(f"  T={tokens} N={experts} k={top_k}: {rows[-1]['kernel, µs']:.2f} µs", file=sys.stderr)
            write_rows("kernel", rows, name, output)
    print(markdown(rows))
    for line in aims(rows):
        print(line)
    if device == "cuda" and not args.quick:
        run_sweep(name, output, args.rounds)
    return 0


def run_sweep(name: str, output: Path, rounds: int) -> None:
    """Print and write the second table."""
    rows = []
    for experts, top_k in SHAPES:
        for tokens in SWEEP_SIZES:
            rows.append(sweep(Inputs(tokens, experts, top_k, "cuda"), max(3, rounds // 3)))
            print(f"  sweep T={tokens} N={experts} k={top_k}: {rows[-1]['best']}", file=sys.stderr)
    print("\n" + markdown(rows))
    write_rows("kernel-rows", rows, name, output)


if __name__ == "__main__":
    sys.exit(main())
