"""Measures the speed of `vllm serve` with counterfactual routing against the stock server, side by side.

    python -m benchmarks.serving                on a CPU: the demo model, some minutes
    python -m benchmarks.serving                on a GPU: Qwen3-30B-A3B's dimensions with dummy weights
    python -m benchmarks.serving --layers 48    all its layers, two servers at a time: 139 GiB of GPU memory

All servers are up at the same time and answer in turn, every other round in reverse order. The client is
vLLM's own. Each figure is compared with the stock server's in the same round. The stock server is measured
first and last in a round: its second measurement against its first is the noise. Distinct experts stand next
to every figure, because equal Σ k_l is not equal time. The servers:

    stock     vLLM without the plugin
    off       the plugin, λ = 0 and uniform k: vLLM's own router decides, behind ours
    expert    uniform k and λ·CEI: what the routing kernel costs
    full      the same with k_l from low to high, Σ k_l unchanged
    torch     full, routed by plain torch instead of the Triton kernel (on a GPU)
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import dummy_models, servers
from benchmarks.common.client import ClientFailed, Figures, Load, measure
from benchmarks.common.ratios import Ratio, aim, at_least, paired
from benchmarks.common.results import device_name, markdown, run_folder, write_rows
from benchmarks.common.servers import DUMMY_WEIGHTS, TORCH_ROUTER, Setting
from cor_vllm.testing.server import ServerFailed

DEMO = Path(__file__).parents[1] / "examples/demo/model"
LAMBDA = 0.01  # changes 5 % of the slots of 128 experts under dummy weights, `--cor-swap-rate 0.05`
METRICS = {"tokens/s": "tokens_per_second", "TTFT, ms": "ttft", "TPOT, ms": "tpot"}
AGAIN = "stock again"


def load_of(setting: Setting, batch: int) -> Load:
    """What the client asks of every server at this batch."""
    return Load(setting.model, batch, max(1, 4 // batch), setting.input_len, setting.output_len)


def on_cpu(folder: Path, model: Path, batches: list[int] | None) -> Setting:
    """A model that is small enough for two cores, with its own weights."""
    hf = json.loads((model / "config.json").read_text())
    layers, top_k = hf["num_hidden_layers"], hf["num_experts_per_tok"]
    k = dummy_models.uneven(layers, top_k, 1, 2 * top_k)
    file = str(dummy_models.write_scores(model, k, folder / "scores.safetensors"))
    flags = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "32")
    # One core computes, the others run the client and the front end: threads that wait for each other would
    # wait for those, too. For a moment after a server has worked its core is still busy waiting.
    env = (("VLLM_CPU_OMP_THREADS_BIND", str(max(os.sched_getaffinity(0)))),)
    sizes = tuple(batches or (1, 8, 32))
    return Setting(model, flags, _modes(file), None, None, sizes, 32, 64, pause=0.5, env=env)


def on_gpu(folder: Path, layers: int, batches: list[int] | None, graphs_only: bool) -> Setting:
    """Qwen3-30B-A3B with dummy weights, CUDA graphs on; `graphs_only` leaves torch.compile out."""
    model = dummy_models.write("qwen3-30b-a3b", folder / "model", layers)
    k = dummy_models.uneven(layers, 8, 2, 16)
    file = str(dummy_models.write_scores(model, k, folder / "scores.safetensors"))
    sizes = tuple(batches or (1, 8, 64, 256))
    flags = ("--dtype", "bfloat16", "--load-format", "dummy", "--max-model-len", "1024",
             "--max-num-seqs", str(max(sizes)), "--kv-cache-memory-bytes", str(kv_bytes(layers)),
             # Only a check at the start, and it has to hold for the last server too.
             "--gpu-memory-utilization", "0.05", "--cudagraph-capture-sizes",
             *(str(2**i) for i in range(max(sizes).bit_length())))  # fmt: skip
    if graphs_only:
        flags += ("-cc.mode=0", "-cc.cudagraph_mode=FULL_DECODE_ONLY")
    cor = _modes(file)
    return Setting(model, flags, {**cor, "torch": cor["full"]}, TORCH_ROUTER, DUMMY_WEIGHTS, sizes, 128, 96)


def _modes(file: str) -> dict[str, dict[str, Any]]:
    return {
        "off": {"scores": file, "mode": "off"},
        "expert": {"scores": file, "mode": "expert", "lambda": LAMBDA},
        "full": {"scores": file, "mode": "full", "lambda": LAMBDA},
    }


def kv_bytes(layers: int) -> int:
    """Bytes that 256 sequences of 256 tokens take in the cache, with a reserve.

    A token has 4 heads of 128 keys and values in bf16 in each layer.
    """
    return int(1.2 * 256 * 256 * layers * 2 * 4 * 128 * 2)


def server_gib(layers: int) -> float:
    """GiB of GPU memory of one server: weights, cache, and 4 GiB for contexts, graphs and activations."""
    return dummy_models.gibibytes(layers) + kv_bytes(layers) / dummy_models.GIB + 4


def together(layers: int | None, free: float) -> tuple[int, int]:
    """Layers, and how many servers of them fit into `free` GiB at once: all five, or two.

    Raises:
        ServerFailed: not even two do.
    """
    for count in (layers,) if layers else (12, 8, 6, 4):
        for many in (5, 2) if layers else (5,):
            if many * server_gib(count) <= free:
                return count, many
    count = layers or 4
    raise ServerFailed(
        f"two servers of {count} layers take {2 * server_gib(count):.0f} GiB of GPU memory, {free:.0f} are "
        "free: give fewer --layers, or stop what else is on the GPU"
    )


Rounds = dict[int, dict[str, list[Figures]]]  # batch → contestant → one per round


def alternate(urls: dict[str, str], setting: Setting, seconds: float, most: int) -> Rounds:
    """Measure whole rounds until the time is up, at least one; a round that does not count comes first."""
    order = [*urls, AGAIN]
    measured: Rounds = {batch: {name: [] for name in order} for batch in setting.batches}
    start = time.monotonic()
    for number in range(most + 1):
        began = time.monotonic()
        for batch in setting.batches:
            for name in order if number % 2 else reversed(order):
                time.sleep(setting.pause)
                load = load_of(setting, batch) if number else replace(load_of(setting, batch), waves=1)
                figures = measure(urls["stock" if name == AGAIN else name], load)
                if number:
                    measured[batch][name].append(figures)
        took = time.monotonic() - began
        print(f"  {f'round {number}' if number else 'warm-up'}: {took:.0f} s", file=sys.stderr)
        if number and time.monotonic() + took - start > seconds:
            break
    return measured


def rows_of(measured: Rounds, distinct: dict[str, dict[int, Any]]) -> list[dict[str, Any]]:
    """Make one row for each batch and contestant; `stock again` shows the noise."""
    rows = []
    for batch, by_name in measured.items():
        for name, figures in by_name.items():
            row: dict[str, Any] = {"batch": batch, "server": name}
            for title, field in METRICS.items():
                values = [getattr(each, field) for each in figures]
                base = [getattr(each, field) for each in by_name["stock"]]
                if name not in ("stock", AGAIN):
                    again = [getattr(each, field) for each in by_name[AGAIN]]
                    base = [(first + last) / 2 for first, last in zip(base, again, strict=True)]
                row[title] = round(sum(values) / len(values), 2)
                row[f"{title.split(',')[0]} / stock"] = "" if name == "stock" else paired(values, base)
            experts = distinct.get(name, {}).get(batch, {})
            row["distinct experts"] = experts.get("distinct", "")
            rows.append(row | {"Σ k_l": experts.get("sum_k", ""), "rounds": len(figures)})
    return rows


def aims(rows: list[dict[str, Any]], gpu: bool) -> Iterator[str]:
    """Tokens per second against stock, judged by the whole interval at every batch."""
    bounds = {"off": 0.99, "expert": 0.99, "full": 0.97} if gpu else {"off": 0.98, "full": 0.98}
    for name, bound in bounds.items():
        ratios: dict[int, Ratio] = {r["batch"]: r["tokens/s / stock"] for r in rows if r["server"] == name}
        if not ratios:
            continue
        verdicts = {at_least(ratio, bound) for ratio in ratios.values()}
        worst = next(v for v in ("missed", "undecided", "met") if v in verdicts)
        figures = "; ".join(f"batch {batch}: {ratio}" for batch, ratio in ratios.items())
        yield aim(f"{name}: tokens/s at least {bound} of stock", worst, figures)


def distinct_experts(setting: Setting, one_by_one: bool) -> dict[str, dict[int, Any]]:
    """What benchmarks.distinct counted, by contestant and batch; `off` routes as stock, `torch` as full."""
    chosen = [c for c in setting.contestants() if c.name not in ("off", "torch")]
    running: dict[str, subprocess.Popen[str]] = {}
    found: dict[str, dict[int, Any]] = {}
    for contestant in chosen:
        running[contestant.name] = servers.count_experts(contestant, setting)
        if one_by_one:
            running[contestant.name].wait()
    for name, process in running.items():
        output = process.communicate()[0].splitlines()
        if process.returncode != 0:
            raise ServerFailed(f"counting the experts of {name!r} failed: {(output or ['no output'])[-1]}")
        found[name] = {each["batch"]: each for each in json.loads(output[-1])}
    return {**found, "off": found["stock"], "torch": found["full"], AGAIN: found["stock"]}


def groups(setting: Setting, many: int) -> list[Setting]:
    """All contestants at once if they fit, else stock with each of the others in turn."""
    if many > len(setting.cor):
        return [setting]
    return [replace(setting, cor={name: cor}) for name, cor in setting.cor.items()]


def run(setting: Setting, many: int, seconds: float, most: int, logs: Path) -> list[dict[str, Any]]:
    """Start the servers, measure, and stop them; returns the figures of every round in one list."""
    parts = groups(setting, many)
    flat = []
    for number, part in enumerate(parts):
        began = time.monotonic()
        with servers.running(part.contestants(), part, logs) as urls:
            print(f"  {len(urls)} servers up after {time.monotonic() - began:.0f} s", file=sys.stderr)
            left = seconds / len(parts) - (time.monotonic() - began)
            for batch, by_name in alternate(urls, part, left, most).items():
                for name, figures in by_name.items():
                    flat += [
                        {"pair": number, "batch": batch, "server": name, "round": i, **vars(each)}
                        for i, each in enumerate(figures)
                    ]
    return flat


def tables(flat: list[dict[str, Any]], distinct: dict[str, dict[int, Any]]) -> list[dict[str, Any]]:
    """The rows of the table, for every pair of servers that ran together."""
    rows = []
    for pair in dict.fromkeys(each["pair"] for each in flat):
        measured: Rounds = {}
        for each in (each for each in flat if each["pair"] == pair):
            figures = Figures(each["tokens_per_second"], each["ttft"], each["tpot"])
            measured.setdefault(each["batch"], {}).setdefault(each["server"], []).append(figures)
        rows += rows_of(measured, distinct)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], help="where it runs (default: cuda if there is one)"
    )
    parser.add_argument(
        "--layers", type=int, help="layers of the dummy model (default: as many as fit five times)"
    )
    parser.add_argument("--model", type=Path, default=DEMO, help="the model on a CPU (default: the demo's)")
    parser.add_argument(
        "--batches", type=int, nargs="+", help="batch sizes (default: 1 8 64 256, on a CPU 1 8 32)"
    )
    parser.add_argument(
        "--seconds", type=float, default=300, help="time to start and measure in (default: 300)"
    )
    parser.add_argument("--rounds", type=int, default=12, help="most rounds to measure (default: 12)")
    parser.add_argument("--graphs-only", action="store_true", help="use CUDA graphs without torch.compile")
    parser.add_argument("--output", type=Path, help="folder for the CSV files (default: in results/)")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder, many = Path(name), 5
        try:
            if device == "cuda":
                layers, many = together(args.layers, torch.cuda.mem_get_info()[0] / dummy_models.GIB)
                setting = on_gpu(folder, layers, args.batches, args.graphs_only)
            else:
                setting = on_cpu(folder, args.model, args.batches)
            began = time.monotonic()
            distinct = distinct_experts(setting, one_by_one=device == "cpu" or many < 5)
            left = args.seconds - (time.monotonic() - began)
            flat = run(setting, many, left, args.rounds, folder)
        except (ServerFailed, ClientFailed) as error:
            print(f"benchmarks.serving: {error}", file=sys.stderr)
            return 1
    rows = tables(flat, distinct)
    print(markdown(rows))
    output = args.output or run_folder(device)
    write_rows("serving", rows, device_name(device), output)
    write_rows("serving-rounds", flat, device_name(device), output)
    for line in aims(rows, gpu=device == "cuda"):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
