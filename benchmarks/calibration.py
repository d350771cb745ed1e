"""Time of the sweep against the plain algorithm: same process, same model, same positions.

    python benchmarks/calibration.py                         random models of growing size, about two minutes
    python benchmarks/calibration.py --model FOLDER          a checkpoint, for growing numbers of positions
    python benchmarks/calibration.py --model FOLDER --tokens 10000 --no-plain

Runs alternate between the two, so that a busy machine slows both; the table gives the median and the range.
Layer-rows are token positions times decoder layers, counted where they happen. The fitted law, from the
quickest runs, is time = fixed + rate · layer-rows.
"""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cor_vllm.calibrate.config import CalibrationOptions
from cor_vllm.calibrate.loading import load_model
from cor_vllm.calibrate.measure import Baseline
from cor_vllm.calibrate.moe_model import MoeModel
from cor_vllm.calibrate.plain import PlainAlgorithm, baseline
from cor_vllm.calibrate.stratify import Strata, stratify
from cor_vllm.calibrate.sweep import Sweep

RESULTS = Path(__file__).with_name("results")
LAYERS, EXPERTS, TOKENS = 4, 16, 500  # the shape from which one number at a time grows


@dataclass(frozen=True)
class Shape:
    """One line of the table."""

    model: str
    layers: int
    experts: int
    top_k: int
    tokens: int
    seq_len: int


@dataclass
class Timing:
    """One algorithm on one shape."""

    shape: Shape
    algorithm: str
    hard: int
    layer_rows: int
    seconds: list[float]

    def median(self) -> float:
        return statistics.median(self.seconds)


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


def random_sequences(vocabulary: int, tokens: int, seq_len: int) -> list[list[int]]:
    """Token ids with `tokens` positions in all."""
    generator = torch.Generator().manual_seed(0)
    lengths = [seq_len] * (tokens // (seq_len - 1))
    left = tokens - len(lengths) * (seq_len - 1)
    lengths += [left + 1] if left else []
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


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
    strata = stratify(base.losses, 90, 10)
    timings = [Timing(shape, name, int(strata.hard.sum()), 0, []) for name in algorithms]
    for _ in range(repeats):
        for timing in timings:
            chosen = CalibrationOptions(
                model="benchmark", output=Path("none"), **{"algorithm": timing.algorithm} | options
            )
            seconds, timing.layer_rows = run_once(model, chosen, sequences, base, strata)
            timing.seconds.append(seconds)
    return timings


def run_once(
    model: MoeModel,
    chosen: CalibrationOptions,
    sequences: list[list[int]],
    base: Baseline,
    strata: Strata,
) -> tuple[float, int]:
    """Wall seconds and layer-rows of one measurement of all layers."""
    synchronize(model)
    start = time.perf_counter()
    kind: Any = Sweep if chosen.algorithm == "sweep" else PlainAlgorithm
    with counted_rows(model) as rows:
        algorithm = kind(model, chosen, sequences, base, strata)
        for step in range(len(algorithm.work())):
            algorithm.step(step)
        algorithm.result()
    synchronize(model)
    return time.perf_counter() - start, sum(rows)


def synchronize(model: MoeModel) -> None:
    """Wait for the device, where it has a queue."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def grid(seq_len: int) -> Iterator[tuple[MoeModel, Shape]]:
    """Random models: one number at a time doubles."""
    shapes = [(layers, EXPERTS, TOKENS) for layers in (2, 4, 8)]
    shapes += [(LAYERS, experts, TOKENS) for experts in (8, 32)]
    shapes += [(LAYERS, EXPERTS, tokens) for tokens in (250, 1000)]
    for layers, experts, tokens in shapes:
        yield random_model(layers, experts), Shape("random", layers, experts, 4, tokens, seq_len)


def print_table(timings: list[Timing], console: Console) -> None:
    """One line per shape, the algorithms side by side."""
    table = Table("model", "layers", "experts", "positions", "hard", "sweep, s", "plain, s", "times",
                  "layer-rows, sweep", "plain")  # fmt: skip
    for shape in dict.fromkeys(timing.shape for timing in timings):
        by_name = {timing.algorithm: timing for timing in timings if timing.shape == shape}
        sweep, plain = by_name["sweep"], by_name.get("plain")
        table.add_row(
            shape.model, str(shape.layers), str(shape.experts), str(shape.tokens), str(sweep.hard),
            spread(sweep), spread(plain) if plain else "",
            f"{plain.median() / sweep.median():.0f}" if plain else "",
            f"{sweep.layer_rows:,}", f"{plain.layer_rows:,}" if plain else "",
        )  # fmt: skip
    console.print(table)


def spread(timing: Timing) -> str:
    """Median and range of the repeats."""
    return f"{timing.median():.2f} ({min(timing.seconds):.2f}–{max(timing.seconds):.2f})"


def law(timings: list[Timing]) -> str:
    """Least squares over the sweep's shapes: fixed seconds, microseconds per layer-row, R²."""
    own = [timing for timing in timings if timing.algorithm == "sweep"]
    if len(own) < 3:
        return ""
    rows, seconds = [float(t.layer_rows) for t in own], [min(t.seconds) for t in own]  # least disturbed
    rate, fixed = statistics.linear_regression(rows, seconds)
    fit = statistics.correlation(rows, seconds) ** 2
    return f"sweep: {fixed:.2f} s + {rate * 1e6:.2f} µs per layer-row, R² {fit:.3f} over {len(own)} shapes"


def write_csv(timings: list[Timing], device: str) -> Path:
    """One row per shape and algorithm, with where and when."""
    now = datetime.now(UTC)
    where = {
        "date": now.isoformat(timespec="seconds"),
        "device": device,
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("cor-vllm", "torch", "transformers")},
    }
    rows = [
        asdict(timing.shape)
        | {"algorithm": timing.algorithm, "hard": timing.hard, "layer_rows": timing.layer_rows,
           "repeats": len(timing.seconds), "median_s": round(timing.median(), 4),
           "min_s": round(min(timing.seconds), 4), "max_s": round(max(timing.seconds), 4)} | where
        for timing in timings
    ]  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"calibration-{now:%Y%m%d-%H%M%S}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint instead of random models")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[250, 500, 1000], help="positions, with --model"
    )
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-memory", default="2GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    algorithms = ["sweep", "plain"] if args.plain else ["sweep"]
    cases: Iterator[tuple[MoeModel, Shape]] = grid(args.seq_len)
    if args.model:
        model = load_model(args.model, args.dtype, args.device)
        cases = (
            (
                model,
                Shape(
                    args.model.resolve().name,
                    model.num_layers,
                    model.num_experts,
                    model.top_k,
                    tokens,
                    args.seq_len,
                ),
            )
            for tokens in args.tokens
        )
    timings: list[Timing] = []
    device = ""
    for model, shape in cases:
        timings += measure(model, shape, algorithms, args.repeats, {"max_memory": args.max_memory})
        on_gpu = model.device.type == "cuda"
        device = torch.cuda.get_device_name(model.device) if on_gpu else platform.processor() or "cpu"
    console = Console(width=150)
    print_table(timings, console)
    console.print(law(timings), highlight=False)
    console.print(f"{device}, {torch.get_num_threads()} threads; wrote {write_csv(timings, device)}")


if __name__ == "__main__":
    main()
