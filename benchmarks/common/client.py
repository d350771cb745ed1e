"""Runs vLLM's own serving benchmark in this process, as `vllm bench serve` runs it."""

import argparse
import asyncio
import contextlib
import functools
import gc
import io
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from vllm.benchmarks import serve
from vllm.benchmarks.datasets import SampleRequest, get_samples
from vllm.tokenizers import get_tokenizer
from vllm.utils.argparse_utils import FlexibleArgumentParser

# Some prompts are a token longer than asked for; all servers get the same ones.
logging.getLogger("vllm.benchmarks.datasets").setLevel(logging.ERROR)
# Every measurement asks for the tokenizer of the same model.
serve.get_tokenizer = functools.cache(get_tokenizer)


class ClientFailed(RuntimeError):
    """Some requests were not answered."""


@dataclass(frozen=True)
class Load:
    """What is asked for: `batch` requests at once, `waves` times; lengths are in tokens."""

    model: Path
    batch: int
    waves: int
    input_len: int
    output_len: int

    def arguments(self, url: str) -> argparse.Namespace:
        """Arguments of `vllm bench serve`; the seed is fixed, so that every server gets the same prompts."""
        parser = FlexibleArgumentParser()
        serve.add_cli_args(parser)
        options: Sequence[object] = (
            "--base-url", url.removesuffix("/v1"), "--model", self.model, "--dataset-name", "random",
            "--random-input-len", self.input_len, "--random-output-len", self.output_len,
            "--num-prompts", self.batch * self.waves, "--max-concurrency", self.batch, "--ignore-eos",
            "--temperature", 0, "--seed", 0, "--disable-tqdm", "--ready-check-timeout-sec", 0,
        )  # fmt: skip
        return parser.parse_args([str(option) for option in options])

    def prompts(self) -> list[str]:
        """The prompts of one wave, as the benchmark makes them."""
        args = self.arguments("http://none/v1")
        args.num_prompts = self.batch
        random.seed(args.seed)
        np.random.seed(args.seed)
        with contextlib.redirect_stdout(io.StringIO()):
            requests: list[SampleRequest] = get_samples(args, get_tokenizer(str(self.model)))
        return [str(request.prompt) for request in requests]


@dataclass(frozen=True)
class Figures:
    """The results of one measurement of one server."""

    tokens_per_second: float
    ttft: float  # median, ms
    tpot: float  # median, ms; without the first token


def measure(url: str, load: Load) -> Figures:
    """Run the benchmark against a server.

    Raises:
        ClientFailed: a request failed, or came back with another number of tokens.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = asyncio.run(serve.main_async(load.arguments(url)))
    gc.unfreeze()  # what the benchmark has frozen; at exit nanobind calls it leaked
    wanted = load.batch * load.waves
    if result["completed"] != wanted or result["total_output_tokens"] != wanted * load.output_len:
        raise ClientFailed(
            f"{url}: {result['completed']} of {wanted} requests and {result['total_output_tokens']} of "
            f"{wanted * load.output_len} tokens came back; the server's log says why"
        )
    return Figures(result["output_throughput"], result["median_ttft_ms"], result["median_tpot_ms"])
