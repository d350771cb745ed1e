"""Counts the distinct experts of each layer and decode step: equal Σ k_l is not equal memory traffic.

    python -m benchmarks.distinct --engine '{"model": "FOLDER"}' --batches 1 8

Runs one engine in this process, without CUDA graphs; the routers themselves say which experts they chose. The
last line of the output is JSON with one object for each batch.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Recorder:
    """Counts the experts of every decode step of `batch` sequences, by layer."""

    def __init__(self) -> None:
        self.batch = 0
        self.counts: dict[int, list[int]] = {}
        self.top_k: dict[int, int] = {}

    def start(self, batch: int) -> None:
        self.batch, self.counts = batch, {}

    def of_layer(self, layer: int) -> Callable[[torch.Tensor], None]:
        def capture(ids: torch.Tensor) -> None:
            # A step over exactly one token per sequence; prompts come in longer pieces.
            if ids.shape[0] == self.batch:
                self.counts.setdefault(layer, []).append(int(ids[ids >= 0].unique().numel()))
                # Rows may be padded to the widest layer's k by repeats of an id.
                self.top_k[layer] = int(ids[0].unique().numel())

        return capture

    def result(self) -> dict[str, Any]:
        """The means over the steps, for each layer and over the layers."""
        per_layer = [statistics.fmean(counts) for _, counts in sorted(self.counts.items())]
        return {
            "batch": self.batch,
            "steps": len(next(iter(self.counts.values()))),
            "distinct": round(statistics.fmean(per_layer), 2),
            "per_layer": [round(value, 1) for value in per_layer],
            "sum_k": sum(self.top_k.values()),
        }


def attach(model: torch.nn.Module, recorder: Recorder) -> int:
    """Listen to every MoE layer of a model; returns their number."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    runners = [module for module in model.modules() if isinstance(module, MoERunner)]
    for layer, runner in enumerate(runners):
        runner.router.set_capture_fn(recorder.of_layer(layer))
    return len(runners)


def run(engine: dict[str, Any], batches: list[int], input_len: int, steps: int) -> list[dict[str, Any]]:
    """Run an engine and return one result for each batch."""
    from vllm import LLM, SamplingParams

    from benchmarks.common.client import Load

    llm = LLM(**engine, enforce_eager=True, enable_prefix_caching=False, disable_log_stats=True)
    recorder = Recorder()
    llm.apply_model(lambda model: attach(model, recorder))
    results = []
    for batch in batches:
        prompts = Load(Path(engine["model"]), batch, 1, input_len, steps).prompts()
        recorder.start(batch)
        llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True), use_tqdm=False
        )
        results.append(recorder.result())
        print(f"  batch {batch}: {results[-1]['distinct']} distinct experts per layer", file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--engine", type=json.loads, required=True, help="arguments of vllm.LLM as JSON")
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    parser.add_argument("--input-len", type=int, default=100)
    parser.add_argument("--steps", type=int, default=16)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine has to be in this process
    print(json.dumps(run(args.engine, args.batches, args.input_len, args.steps)))


if __name__ == "__main__":
    main()
