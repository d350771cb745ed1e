"""Times the sweep against the plain algorithm, in the same process, on the same model and positions.

    python -m benchmarks.calibration                         random models of growing size, a few minutes
    python -m benchmarks.calibration --model FOLDER          a checkpoint, for growing numbers of positions
    python -m benchmarks.calibration --model FOLDER --tokens 10000 --no-plain

Runs alternate between the two, so that a busy machine slows both. The table gives wall time (median and
range) and the CPU time of the quickest run. Without a GPU the laws are fitted to CPU time, because other jobs
on the machine disturb it least. Layer-rows are token positions times decoder layers, counted in the layers
themselves. There are two laws: time = fixed + rate · layer-rows + rate · layer calls · N; and, for random
models, rows and time as powers of layers M, experts N, positions P and hard positions H.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common.results import device_name, write_rows
from benchmarks.common.sequences import random_sequences
from cor_vllm.calibrate.config import CalibrationOptions
from cor_vllm.calibrate.interventions.measurement import Baseline, baseline
from cor_vllm.calibrate.interventions.plain import PlainAlgorithm
from cor_vllm.calibrate.interventions.sweep import Sweep
from cor_vllm.calibrate.model.loading import load_model
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.text.stratify import Strata, stratify

LAYERS, EXPERTS, TOKENS, PERCENTILE = 4, 16, 500, 90.0  # the shape from which one number at a time changes


@dataclass(frozen=True)
class Shape:
    """One line of the table."""

    model: str
    layers: int
    experts: int
    top_k: int
    tokens: int
    seq_len: int
    hard_percentile: float = PERCENTILE


@dataclass
class Timing:
    """One algorithm on one shape."""

    shape: Shape
    algorithm: str
    hard: int
    layer_rows: int
    seconds: list[float]  # wall
    cpu_seconds: list[float]  # of the whole process, all threads
    load: float = 0.0  # the machine's one-minute load average, highest of the runs
    gpu: bool = False
    layer_calls: int = 0  # calls of decoder layers; each loops over the experts

    def median(self) -> float:
        return statistics.median(self.seconds)

    def least(self) -> float:
        """Seconds of the least disturbed run; on a GPU the process's CPU time says nothing about the work."""
        return min(self.seconds if self.gpu else self.cpu_seconds)


def random_model(layers: int, experts: int) -> MoeModel:
    """A Qwen3-MoE with random weights; only its dimensions matter here."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=experts, num_experts_per_tok=4,
        moe_intermediate_size=64, norm_topk_prob=True, architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    config._experts_implementation = "eager"
    return MoeModel(Qwen3MoeForCausalLM(config))


@contextmanager
def counted_rows(model: MoeModel) -> Iterator[list[int]]:
    """Collects the token positions of every call of a decoder layer."""
    counts: list[int] = []

    def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        counts.append(args[0].shape[0] * args[0].shape[1])

    handles = [layer.register_forward_pre_hook(count) for layer in model.decoder_layers]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def measure(
    model: MoeModel, shape: Shape, algorithms: Sequence[str], repeats: int, options: dict[str, Any]
) -> list[Timing]:
    """Time each algorithm `repeats` times, in turn; baseline and strata are not counted."""
    sequences = random_sequences(model.config.vocab_size, shape.tokens, shape.seq_len)
    base = baseline(model, sequences)
    strata = stratify(base.losses, shape.hard_percentile, 10)
    gpu = model.device.type == "cuda"
    timings = [Timing(shape, name, int(strata.hard.sum()), 0, [], [], gpu=gpu) for name in algorithms]
    for _ in range(repeats):
        for timing in timings:
            chosen = CalibrationOptions(
                model="benchmark",
                output=Path("none"),
                **{"algorithm": timing.algorithm, "intensity": "ratio"} | options,
            )
            seconds, cpu, rows = run_once(model, chosen, sequences, base, strata)
            timing.layer_rows, timing.layer_calls = sum(rows), len(rows)
            timing.seconds.append(seconds)
            timing.cpu_seconds.append(cpu)
            timing.load = max(timing.load, os.getloadavg()[0])
    return timings


def run_once(
    model: MoeModel,
    chosen: CalibrationOptions,
    sequences: list[list[int]],
    base: Baseline,
    strata: Strata,
) -> tuple[float, float, list[int]]:
    """Wall seconds, CPU seconds and the rows of every layer call of one measurement of all layers."""
    synchronize(model)
    start, cpu = time.perf_counter(), time.process_time()
    kind: Any = Sweep if chosen.algorithm == "sweep" else PlainAlgorithm
    with counted_rows(model) as rows:
        algorithm = kind(model, chosen, sequences, base, strata)
        for step in range(len(algorithm.work())):
            algorithm.step(step)
        algorithm.result()
    synchronize(model)
    return time.perf_counter() - start, time.process_time() - cpu, rows


def synchronize(model: MoeModel) -> None:
    """Wait for the device, if it has a queue."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def grid(seq_len: int) -> Iterator[tuple[MoeModel, Shape]]:
    """Random models: one number at a time doubles; hard positions also with the number of positions fixed."""
    start = Shape("random", LAYERS, EXPERTS, 4, TOKENS, seq_len)
    shapes = [replace(start, layers=layers) for layers in (1, 2, 4, 8)]
    shapes += [replace(start, experts=experts) for experts in (8, 32, 64)]
    shapes += [replace(start, tokens=tokens) for tokens in (250, 1000, 2000)]
    shapes += [replace(start, hard_percentile=percentile) for percentile in (80.0, 60.0, 20.0)]
    for shape in shapes:
        yield random_model(shape.layers, shape.experts), shape


def checkpoint(model: MoeModel, name: str, tokens: Sequence[int], seq_len: int) -> Iterator[Any]:
    """One model, growing numbers of positions."""
    for count in tokens:
        yield model, Shape(name, model.num_layers, model.num_experts, model.top_k, count, seq_len)


def print_table(timings: list[Timing], console: Console) -> None:
    """One line per shape, the algorithms side by side."""
    table = Table("model", "M", "N", "positions", "hard", "sweep, s", "plain, s", "times",
                  "CPU s, sweep", "plain", "times", "rows, sweep", "plain", "times")  # fmt: skip
    for shape in dict.fromkeys(timing.shape for timing in timings):
        by_name = {timing.algorithm: timing for timing in timings if timing.shape == shape}
        sweep, plain = by_name["sweep"], by_name.get("plain")
        cells = [f"{min(sweep.cpu_seconds):.2f}", "", "", f"{sweep.layer_rows:,}", "", ""]
        if plain:
            cpu = min(plain.cpu_seconds)
            cells[1:3] = f"{cpu:.2f}", f"{cpu / min(sweep.cpu_seconds):.0f}"
            cells[4:] = f"{plain.layer_rows:,}", f"{plain.layer_rows / sweep.layer_rows:.0f}"
        table.add_row(
            shape.model, str(shape.layers), str(shape.experts), str(shape.tokens), str(sweep.hard),
            spread(sweep), spread(plain) if plain else "",
            f"{plain.median() / sweep.median():.0f}" if plain else "", *cells,
        )  # fmt: skip
    console.print(table)


def spread(timing: Timing) -> str:
    """Median and range of the repeats."""
    return f"{timing.median():.2f} ({min(timing.seconds):.2f}–{max(timing.seconds):.2f})"


def law(timings: list[Timing], algorithm: str = "sweep") -> str:
    """Least squares over one algorithm's shapes: fixed seconds, per layer-row, per layer call and expert."""
    own = [timing for timing in timings if timing.algorithm == algorithm]
    if len(own) < 3:
        return ""
    columns = [[1.0] * len(own), [float(t.layer_rows) for t in own]]
    turns = [float(t.layer_calls * t.shape.experts) for t in own]
    if len(set(turns)) > 1 and len(own) > 3:
        columns.append(turns)
    target = torch.tensor([t.least() for t in own], dtype=torch.float64)
    (fixed, *rates), fit, _ = least_squares(columns, target)
    units = ("layer-row", "layer call and expert")
    rest = "".join(f" + {rate * 1e6:.2f} µs per {unit}" for rate, unit in zip(rates, units, strict=False))
    return f"{algorithm}: {fixed:.2f} s{rest}, R² {fit:.3f} over {len(own)} shapes"


def least_squares(columns: list[list[float]], target: torch.Tensor) -> tuple[list[float], float, list[float]]:
    """Coefficients, R², and the coefficients' standard errors."""
    design = torch.tensor(columns, dtype=torch.float64).T
    scale = design.abs().amax(dim=0)
    found = torch.linalg.lstsq(design / scale, target).solution
    residual = (target - design / scale @ found).square().sum()
    fit = 1 - (residual / (target - target.mean()).square().sum()).item()
    variance = residual / max(len(target) - len(found), 1)
    errors = (torch.linalg.pinv((design / scale).T @ (design / scale)).diagonal() * variance).sqrt()
    return (found / scale).tolist(), fit, (errors / scale).tolist()


def power_law(timings: list[Timing], algorithm: str, quantity: str) -> str:
    """Least squares of the logarithm of "rows" or "seconds": exponents of M, N, P, H with standard errors."""
    own = [timing for timing in timings if timing.algorithm == algorithm]
    names = {"M": lambda t: t.shape.layers, "N": lambda t: t.shape.experts,
             "P": lambda t: t.shape.tokens, "H": lambda t: t.hard}  # fmt: skip
    columns = [[math.log(value(t)) for t in own] for value in names.values()]
    design = torch.tensor([[1.0] * len(own), *columns], dtype=torch.float64).T
    if len(own) <= design.shape[1] or torch.linalg.matrix_rank(design) < design.shape[1]:
        return ""
    values = [t.least() if quantity == "seconds" else t.layer_rows for t in own]
    target = torch.tensor(values, dtype=torch.float64).log()
    found, fit, errors = least_squares([[1.0] * len(own), *columns], target)
    powers = (f"{n}^({b:.2f} ± {e:.2f})" for n, b, e in zip(names, found[1:], errors[1:], strict=True))
    return f"{algorithm} {quantity} ~ {' '.join(powers)}, R² {fit:.3f} over {len(own)} shapes"


def linear_in_hard(timings: list[Timing], algorithm: str) -> str:
    """Seconds against hard positions, over the random models of the first shape."""
    of_model = (t for t in timings if t.shape.model == "random" and t.algorithm == algorithm)
    same = [t for t in of_model if (t.shape.layers, t.shape.experts) == (LAYERS, EXPERTS)]
    lines = []
    for what, own in (
        ("P fixed", [t for t in same if t.shape.tokens == TOKENS]),
        ("P grows with H", [t for t in same if t.shape.hard_percentile == PERCENTILE]),
    ):
        if len(own) >= 3:
            hard, seconds = [float(t.hard) for t in own], [t.least() for t in own]
            rate, fixed = statistics.linear_regression(hard, seconds)
            fit = statistics.correlation(hard, seconds) ** 2
            law = f"{fixed:.2f} s + {rate * 1e3:.2f} ms per hard position, R² {fit:.3f}"
            lines.append(f"{algorithm}, {what}: {law}")
    return "\n".join(lines)


def laws(timings: list[Timing]) -> Iterator[str]:
    """Every law that these shapes determine."""
    for algorithm in ("sweep", "plain"):
        yield law(timings, algorithm)
        for quantity in ("rows", "seconds"):
            yield power_law(timings, algorithm, quantity)
        yield linear_in_hard(timings, algorithm)


def csv_rows(timings: list[Timing]) -> list[dict[str, Any]]:
    """One row per shape and algorithm."""
    return [
        asdict(timing.shape)
        | {"algorithm": timing.algorithm, "hard": timing.hard, "layer_rows": timing.layer_rows,
           "layer_calls": timing.layer_calls,
           "repeats": len(timing.seconds), "median_s": round(timing.median(), 4),
           "min_s": round(min(timing.seconds), 4), "max_s": round(max(timing.seconds), 4),
           "cpu_median_s": round(statistics.median(timing.cpu_seconds), 4),
           "cpu_min_s": round(min(timing.cpu_seconds), 4), "load_average": round(timing.load, 2)}
        for timing in timings
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint instead of random models")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[250, 500, 1000], help="positions, with --model"
    )
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--device", help="where it runs (default: cuda if there is one)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-memory", default="2GB")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    algorithms = ["sweep", "plain"] if args.plain else ["sweep"]
    cases: Iterator[tuple[MoeModel, Shape]] = grid(args.seq_len)
    if args.model:
        model = load_model(args.model, args.dtype, args.device)
        cases = checkpoint(model, args.model.resolve().name, args.tokens, args.seq_len)
    timings: list[Timing] = []
    device = ""
    for model, shape in cases:
        timings += measure(model, shape, algorithms, args.repeats, {"max_memory": args.max_memory})
        device = device_name(model.device.type)
    console = Console(width=180)
    print_table(timings, console)
    for line in filter(None, laws(timings)):
        console.print(line, highlight=False)
    path = write_rows("calibration", csv_rows(timings), device)
    console.print(f"{device}, {torch.get_num_threads()} threads; wrote {path.name}")


if __name__ == "__main__":
    main()
