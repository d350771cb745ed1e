"""Memory of a calibration whose weights wait on disk, against one that holds them, as models grow deeper.

    python -m benchmarks.memory

Each calibration is a process of its own. What is measured is anonymous memory (RssAnon, sampled), beyond what
the process held before the model came: pages of a mapped checkpoint, which the kernel takes back when
somebody needs them, do not count. The models are random Qwen3-MoEs; only their sizes matter. On disk:
the calibrator is told of no free memory, by which it decides what has to wait (calibrate/offload.py).
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.calibration import random_sequences
from benchmarks.results import device_name, write_rows
from cor_vllm import lifetime
from cor_vllm.calibrate import offload, pipeline
from cor_vllm.calibrate.config import CalibrationOptions

WIDTH, EXPERTS, TOP_K = 256, 32, 4
POSITIONS, SEQ_LEN = 200, 64


def write_model(folder: Path, layers: int) -> None:
    """A random checkpoint: 24 MiB of expert weights a layer."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        moe_intermediate_size=WIDTH, norm_topk_prob=True,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)


def anonymous_mib() -> float:
    """Anonymous memory of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def one(folder: Path, weights: str) -> dict[str, float]:
    """Calibrate in this process: MiB beyond what it held before the model came, and seconds."""
    torch.set_num_threads(1)
    if weights == "disk":
        offload.free_bytes = lambda device: 0
    ids = folder / "token_ids.json"
    ids.write_text(json.dumps(random_sequences(1024, POSITIONS, SEQ_LEN)))
    options = CalibrationOptions(
        model=str(folder),
        output=folder / f"{weights}.safetensors",
        token_ids=ids,
        device="auto" if weights == "disk" else "cpu",
        max_memory=100 * 10**6,
    )
    before, peak, done = anonymous_mib(), [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_mib())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    try:
        pipeline.calibrate(options, Console(file=io.StringIO()))
    finally:
        done.set()
        sampler.join()
    return {"peak_mib": round(peak[0] - before, 1), "seconds": round(time.perf_counter() - start, 2)}


def measure(layers: int) -> list[dict[str, Any]]:
    """Both ways for one depth; the two files must hold the same."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, layers)
        rows = []
        for weights in ("memory", "disk"):
            command = [sys.executable, "-m", "benchmarks.memory", "--one", str(folder), weights]
            lifetime.guard()
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
            figures = json.loads(done.stdout.splitlines()[-1])
            rows.append({"layers": layers, "weights_mib": round(size / 2**20), "weights": weights} | figures)
        same = len({(folder / f"{weights}.safetensors").read_bytes() for weights in ("memory", "disk")}) == 1
        return [row | {"same_file": same} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "WEIGHTS"), help="used by the program itself")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(Path(args.one[0]), args.one[1])))
        return
    rows = [row for layers in args.layers for row in measure(layers)]
    table = Table("layers", "weights, MiB", "weights are in", "peak beyond start, MiB", "s", "same file")
    for row in rows:
        cells = ("layers", "weights_mib", "weights", "peak_mib", "seconds", "same_file")
        table.add_row(*(str(row[cell]) for cell in cells))
    Console().print(table)
    print(f"wrote {write_rows('memory', rows, device_name('cpu'))}")


if __name__ == "__main__":
    main()
