"""Measures the memory of a calibration whose weights wait on disk, and of one that holds them, by depth.

    python -m benchmarks.memory
    python -m benchmarks.memory --load     # memory that loading takes, next to the calibrator's estimate

Each calibration is a process of its own. The figure is anonymous memory (RssAnon, sampled) beyond what the
process held before it loaded the model. Pages of a mapped checkpoint do not count, because the operating
system takes them back if they are needed. The models are random Qwen3-MoEs; only their sizes matter. To put
weights on disk, the calibrator is told that there is no free memory (calibrate/model/offload.py).

--load measures the peak of loading into host memory, for two widths and for checkpoints in bfloat16 and
float32. It loads as the calibrator does, one weight at a time, and as transformers does by itself, with
threads that read ahead. `counted` is the estimate by which the calibrator chooses where the weights go.
"""

import argparse
import contextlib
import io
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.common.results import device_name, write_rows
from benchmarks.common.sequences import random_sequences
from cor_vllm.calibrate import pipeline
from cor_vllm.calibrate.config import CalibrationOptions
from cor_vllm.calibrate.model import limits, loading, offload
from cor_vllm.commands import lifetime

WIDTH, EXPERTS, TOP_K = 256, 32, 4
POSITIONS, SEQ_LEN = 200, 64
LOADED = ((256, 24), (512, 8))  # width and layers: weights below and above 32 MiB each
COLUMNS = {
    "layers": "layers", "weights_mib": "weights, MiB", "weights": "weights are in",
    "peak_mib": "peak beyond start, MiB", "seconds": "s", "same_file": "same file",
}  # fmt: skip
LOAD_COLUMNS = {
    "width": "width", "layers": "layers", "checkpoint": "checkpoint", "read": "read",
    "weights_mib": "weights, MiB", "counted_mib": "counted, MiB", "peak_mib": "peak, MiB",
    "ratio": "peak / weights",
}  # fmt: skip


def write_model(folder: Path, layers: int, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> None:
    """A random checkpoint: 24 MiB of expert weights a layer in float32, 96 of twice the width."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        moe_intermediate_size=width, norm_topk_prob=True,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(dtype).save_pretrained(folder)


def anonymous_mib() -> float:
    """The anonymous memory of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def one(folder: Path, weights: str) -> dict[str, float]:
    """Calibrate in this process; returns MiB beyond what it held before it loaded the model, and seconds."""
    torch.set_num_threads(1)
    if weights == "disk":
        limits.host_limit = lambda mapped=0: limits.Limit(0, 0, "for this measurement")
    ids = folder / "token_ids.json"
    ids.write_text(json.dumps(random_sequences(1024, POSITIONS, SEQ_LEN)))
    options = CalibrationOptions(
        model=str(folder),
        output=folder / f"{weights}.safetensors",
        token_ids=ids,
        device="auto" if weights == "disk" else "cpu",
        max_memory=100 * 10**6,
    )
    start = time.perf_counter()
    peak = peak_mib(lambda: pipeline.calibrate(options, Console(file=io.StringIO())))
    return {"peak_mib": peak, "seconds": round(time.perf_counter() - start, 2)}


def peak_mib(work: Callable[[], object]) -> float:
    """The most anonymous memory beyond what this process held before, MiB, sampled while `work` runs."""
    before, peak, done = anonymous_mib(), [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_mib())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        kept = work()  # until the last sample is taken
    finally:
        done.set()
        sampler.join()
    del kept
    return round(peak[0] - before, 1)


def load(folder: Path, how: str) -> dict[str, float]:
    """Load in float32 in this process, `one` weight at a time or reading `ahead`; returns MiB."""
    torch.set_num_threads(1)
    if how == "ahead":
        loading.one_weight_at_a_time = contextlib.nullcontext
    weights = offload.weights_of(loading.read_config(folder), torch.float32)
    return {
        "weights_mib": round(weights.size / 2**20, 1),
        "counted_mib": round(weights.peak / 2**20, 1),
        "peak_mib": peak_mib(lambda: loading.load_model(folder, "float32", "cpu")),
    }


def measure_loading() -> list[dict[str, Any]]:
    """Load every checkpoint in both ways."""
    rows = []
    for (width, layers), dtype in itertools.product(LOADED, (torch.bfloat16, torch.float32)):
        with tempfile.TemporaryDirectory() as name:
            write_model(Path(name), layers, width, dtype)
            for how in ("one", "ahead"):
                figures = in_a_process("--one-load", name, how)
                rows.append(
                    {"width": width, "layers": layers, "checkpoint": str(dtype), "read": how} | figures
                )
    return [row | {"ratio": round(row["peak_mib"] / row["weights_mib"], 2)} for row in rows]


def in_a_process(*arguments: str) -> dict[str, Any]:
    """Run this program in a process of its own, and read the JSON that it prints last."""
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    lifetime.guard()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(layers: int) -> list[dict[str, Any]]:
    """Calibrate in both ways at one depth; the two files must hold the same."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, layers)
        rows = []
        for weights in ("memory", "disk"):
            figures = in_a_process("--one", str(folder), weights)
            size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
            rows.append({"layers": layers, "weights_mib": round(size / 2**20), "weights": weights} | figures)
        same = len({(folder / f"{weights}.safetensors").read_bytes() for weights in ("memory", "disk")}) == 1
        return [row | {"same_file": same} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--load", action="store_true", help="measure loading alone")
    for name in ("--one", "--one-load"):
        parser.add_argument(name, nargs=2, metavar=("FOLDER", "HOW"), help="used by the program itself")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(Path(args.one[0]), args.one[1])))
    elif args.one_load:
        print(json.dumps(load(Path(args.one_load[0]), args.one_load[1])))
    elif args.load:
        report("memory-load", measure_loading(), LOAD_COLUMNS)
    else:
        report("memory", [row for layers in args.layers for row in measure(layers)], COLUMNS)


def report(name: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Print a table and write the CSV file."""
    table = Table(*columns.values())
    for row in rows:
        table.add_row(*(str(row[cell]) for cell in columns))
    Console().print(table)
    print(f"wrote {write_rows(name, rows, device_name('cpu'))}")


if __name__ == "__main__":
    main()
