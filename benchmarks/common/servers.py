"""Starts the servers that benchmarks/serving.py compares, and the engines that count their experts."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cor_vllm.commands import lifetime
from cor_vllm.testing.server import ServerFailed, environment, serve

ROOT = Path(__file__).parents[2]
DUMMY_WEIGHTS = "benchmarks.common.dummy_weights.DummyWeights"  # worker extensions, as vLLM is given them
TORCH_ROUTER = "benchmarks.common.torch_router.TorchRouter"
PLAIN_TORCH = "benchmark: plain torch routes"  # in the log of a server with TORCH_ROUTER


@dataclass(frozen=True)
class Contestant:
    """A server, named by its role in the comparison."""

    name: str
    extension: str | None  # class path of a worker extension
    cor: dict[str, Any] | None = None  # additional_config["cor"]; None: vLLM without the plugin

    def flags(self) -> list[str]:
        extension = ["--worker-extension-cls", self.extension] if self.extension else []
        additional = ["--additional-config", json.dumps({"cor": self.cor})] if self.cor else []
        return extension + additional

    def env(self) -> dict[str, str]:
        """The server's environment: worker extensions are found from the root; stock loads no plugin."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = environment(PYTHONPATH=os.pathsep.join(paths))
        ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_PLUGINS", "TRITON_INTERPRET")
        env = {name: value for name, value in env.items() if name not in ours}
        return env if self.cor is not None else {**env, "VLLM_PLUGINS": ""}


@dataclass(frozen=True)
class Setting:
    """What is served, and what is asked of it."""

    model: Path
    flags: tuple[str, ...]  # flags of every server
    cor: dict[str, dict[str, Any]]  # by contestant, additional_config["cor"]; stock has none
    plain_torch: str | None  # worker extension of the contestant "torch"
    dummy_weights: str | None  # worker extension of all others
    batches: tuple[int, ...]
    input_len: int
    output_len: int
    pause: float = 0.0  # seconds between two measurements
    env: tuple[tuple[str, str], ...] = ()  # additional environment of every server

    def contestants(self) -> list[Contestant]:
        return [
            Contestant("stock", self.dummy_weights),
            *(Contestant(name, self.extension(name), cor) for name, cor in self.cor.items()),
        ]

    def extension(self, name: str) -> str | None:
        return self.plain_torch if name == "torch" else self.dummy_weights


@contextlib.contextmanager
def running(contestants: Sequence[Contestant], setting: Setting, logs: Path) -> Iterator[dict[str, str]]:
    """Start all servers side by side, yield their URLs by name, and stop them.

    Raises:
        ServerFailed: a server did not start, or does not route as it should.
    """
    stop = threading.Event()

    def waiting(seconds: float) -> None:
        if stop.is_set():
            raise ServerFailed("stopped while starting")

    contexts = [
        serve(
            setting.model, *setting.flags, "--no-enable-prefix-caching", "--disable-uvicorn-access-log",
            *each.flags(), log=logs / f"{each.name}.log", env=each.env() | dict(setting.env), waiting=waiting,
        )
        for each in contestants
    ]  # fmt: skip
    with ThreadPoolExecutor(len(contexts)) as pool:
        starting = [pool.submit(context.__enter__) for context in contexts]
        try:
            urls = {each.name: start.result() for each, start in zip(contestants, starting, strict=True)}
            for each in contestants:
                _check_log(each, logs / f"{each.name}.log")
            yield urls
        finally:
            stop.set()
            list(pool.map(_leave, contexts, starting))


def _leave(context: contextlib.AbstractContextManager[str], start: Future[str]) -> None:
    if start.exception() is None:  # if there was one, the server has stopped already
        context.__exit__(None, None, None)


def _check_log(contestant: Contestant, log: Path) -> None:
    """Refuse a server that does not run what its name says: the comparison would be worthless."""
    text = log.read_text(errors="replace")
    routed, plain = "CoR: " in text, PLAIN_TORCH in text
    if routed != (contestant.cor is not None) or plain != (contestant.name == "torch"):
        raise ServerFailed(
            f"the server {contestant.name!r} says of itself: counterfactual routing {routed}, plain torch "
            f"{plain}; is cor-vllm's entry point installed? Its log: {log}"
        )


def count_experts(contestant: Contestant, setting: Setting) -> "subprocess.Popen[str]":
    """Start benchmarks.distinct on the same model, prompts and routing, as a process of its own."""
    engine = {"model": str(setting.model), **keywords(setting.flags)}
    if contestant.extension:
        engine["worker_extension_cls"] = contestant.extension
    if contestant.cor:
        engine["additional_config"] = {"cor": contestant.cor}
    command = [sys.executable, "-m", "benchmarks.distinct", "--engine", json.dumps(engine), "--batches",
               *map(str, setting.batches), "--input-len", str(setting.input_len)]  # fmt: skip
    env = contestant.env() | {"VLLM_LOGGING_LEVEL": "ERROR"}
    lifetime.guard()
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


def keywords(flags: Sequence[str]) -> dict[str, Any]:
    """The flags that an eager engine needs, too, as arguments of vllm.LLM."""
    wanted = {"--dtype": str, "--load-format": str, "--max-model-len": int, "--max-num-seqs": int,
              "--kv-cache-memory-bytes": int, "--gpu-memory-utilization": float}  # fmt: skip
    return {
        flag[2:].replace("-", "_"): wanted[flag](value)
        for flag, value in itertools.pairwise(flags)
        if flag in wanted
    }
