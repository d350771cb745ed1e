"""Puts load and faults on a CoR server and on a stock server, and counts the requests that each loses.

    python -m benchmarks.faults [--requests 2000] [--experiments load vanish …]

Both are real servers on the CPU with the demo model. They run one after the other and get the same requests.
An answer counts as wrong if it differs from the same server's answer to the same prompt asked alone. The
stock server's own count is the measure, because batching changes the last bits of a CPU's sums. The program
prints a table and writes it as CSV.
"""

import argparse
import asyncio
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import psutil

from benchmarks.common.results import device_name, markdown, write_rows
from cor_vllm import scores
from cor_vllm.testing.make_scores import make
from cor_vllm.testing.server import ServerFailed, environment, serve

MODEL = Path(__file__).parents[1] / "examples" / "demo" / "model"
EAGER = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "64", "--enforce-eager"]
COMPILED = EAGER[:-1]
PROMPTS = [f"Question {i}: what is the capital of country number {i * 7 % 101}? Answer:" for i in range(50)]
TOKENS = 12
PATIENCE = 900  # seconds for one experiment's requests


@dataclass
class Row:
    """Outcome of one experiment on one server."""

    experiment: str
    server: str
    asked: int = 0
    answered: int = 0
    wrong: int = 0
    failed: int = 0
    seconds: float = 0.0
    note: str = ""


async def stream(
    session: aiohttp.ClientSession, url: str, prompt: str, leave_after: int | None = None
) -> str:
    """One streamed completion; after `leave_after` pieces the client hangs up without a word.

    Raises:
        aiohttp.ClientError: the server refused or broke off.
    """
    body = {"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True,
            "ignore_eos": True}  # fmt: skip
    text, pieces = "", 0
    async with session.post(f"{url}/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                return text
            event = json.loads(line[6:])
            if "error" in event:
                raise aiohttp.ClientPayloadError(str(event["error"])[:200])
            text += event["choices"][0]["text"]
            pieces += 1
            if leave_after is not None and pieces >= leave_after:
                return text
    raise aiohttp.ClientPayloadError("the stream ended without [DONE]")


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session


async def alone(url: str) -> dict[str, str]:
    """The answer to each prompt if nothing else is asked."""
    async with client() as session:
        return {prompt: await stream(session, url, prompt) for prompt in PROMPTS}


async def many(url: str, prompts: list[str], leave_after: int | None = None) -> list[str | BaseException]:
    """Ask all prompts at once."""
    async with client() as session:
        asked = [stream(session, url, prompt, leave_after) for prompt in prompts]
        return await asyncio.gather(*asked, return_exceptions=True)


def count(row: Row, prompts: list[str], answers: list[str | BaseException], right: dict[str, str]) -> Row:
    row.asked = len(prompts)
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    row.failed, row.answered = len(failures), len(answers) - len(failures)
    pairs = zip(prompts, answers, strict=True)
    row.wrong = sum(isinstance(answer, str) and answer != right[prompt] for prompt, answer in pairs)
    if failures:
        row.note = f"{type(failures[0]).__name__}: {failures[0]}"[:160]
    return row


def load(url: str, row: Row, requests: int) -> Row:
    """Run `requests` streams at the same time."""
    right = asyncio.run(alone(url))
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(requests)]
    start = time.perf_counter()
    answers = asyncio.run(many(url, prompts))
    row.seconds = time.perf_counter() - start
    return count(row, prompts, answers, right)


def vanish(url: str, row: Row, requests: int) -> Row:
    """Half of the clients hang up after two pieces: the others must not notice, and nothing may remain."""
    right = asyncio.run(alone(url))
    staying = [PROMPTS[i % len(PROMPTS)] for i in range(requests // 2)]

    async def both() -> list[str | BaseException]:
        _, kept = await asyncio.gather(many(url, staying, leave_after=2), many(url, staying))
        return kept

    start = time.perf_counter()
    answers = asyncio.run(both())
    row.seconds = time.perf_counter() - start
    row = count(row, staying, answers, right)
    left = asyncio.run(_settled(url))
    row.note += f" requests still held 30 s later: {left:.0f}"
    return row


async def _settled(url: str) -> float:
    """How many requests the server still runs or queues, after at most 30 s."""
    held = -1.0
    async with client() as session:
        for _ in range(60):
            async with session.get(url.removesuffix("/v1") + "/metrics") as response:
                lines = (await response.text()).splitlines()
            names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
            held = sum(float(line.split()[-1]) for line in lines if line.startswith(names))
            if held == 0:
                return held
            await asyncio.sleep(0.5)
    return held


def killed(url: str, row: Row, requests: int) -> Row:
    """The engine process dies in the middle of the work: every client must be told, and soon."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(requests)]
    server = _server(url)
    engines = [p for p in server.children(recursive=True) if "EngineCore" in p.name() + " ".join(p.cmdline())]
    if not engines:
        raise RuntimeError(f"no engine process among {[p.name() for p in server.children(recursive=True)]}")

    async def go() -> list[str | BaseException]:
        task = asyncio.create_task(many(url, prompts))
        await asyncio.sleep(1.0)
        engines[0].kill()
        return await task

    start = time.perf_counter()
    answers = asyncio.run(go())
    row.seconds = time.perf_counter() - start
    row.asked = len(prompts)
    row.failed = sum(isinstance(answer, BaseException) for answer in answers)
    row.answered = row.asked - row.failed
    with contextlib.suppress(psutil.TimeoutExpired):
        server.wait(60)
    row.note = f"server process {'still runs' if server.is_running() else 'has ended'}"
    return row


def _server(url: str) -> psutil.Process:
    port = url.rsplit(":", 1)[1].split("/")[0]
    for process in psutil.Process().children(recursive=True):
        if "--port" in (command := process.cmdline()) and command[command.index("--port") + 1] == port:
            return process
    raise RuntimeError(f"no server process on port {port}")


def on_running_servers(
    name: str, run: Callable[[str, Row, int], Row], place: Path, requests: int
) -> Iterator[Row]:
    """Run one experiment on a stock server and on a CoR server."""
    for server in ("stock", "CoR"):
        flags = ["--cor-scores", str(scores_file(place))] if server == "CoR" else []
        with serve(
            MODEL, "--served-model-name", "demo", *EAGER, *flags, log=place / f"{name}-{server}.log"
        ) as url:
            yield run(url, Row(name, server), requests)


def scores_file(place: Path, seed: int = 0) -> Path:
    """A valid file for the demo model with k_l from 1 to 8."""
    path = place / f"scores-{seed}.safetensors"
    scores.save(path, make(MODEL, k=[1, 8, 2, 6, 3, 4], seed=seed))
    return path


def file_changes(place: Path) -> Iterator[Row]:
    """Replace, then delete the scores file of a running server; then start servers with what is left."""
    file, log = scores_file(place), place / "file.log"
    flags = ["--served-model-name", "demo", *EAGER, "--cor-scores", str(file)]
    with serve(MODEL, *flags, log=log) as url:
        right = asyncio.run(alone(url))
        for name, change in (
            ("file replaced under the server", lambda: shutil.copy(scores_file(place, seed=1), file)),
            ("file deleted under the server", file.unlink),
        ):
            change()
            yield count(Row(name, "CoR"), PROMPTS, asyncio.run(many(url, PROMPTS)), right)
    row = Row("start without the file", "CoR")
    try:
        with serve(MODEL, *flags, log=log):
            row.note = "started"
    except ServerFailed as error:
        row.note = str(error)[-160:]
    yield row
    shutil.copy(scores_file(place, seed=1), file)
    with serve(MODEL, *flags, log=log) as url:
        answers = asyncio.run(alone(url))
        changed = sum(answers[prompt] != right[prompt] for prompt in PROMPTS)
        yield Row("start with the other file", "CoR", len(PROMPTS), len(PROMPTS),
                  note=f"{changed} of {len(PROMPTS)} answers are others, as they should be")  # fmt: skip


def bad_caches(place: Path) -> Iterator[Row]:
    """Start with a compile cache full of nonsense, and with a disk on which nothing can be written."""
    for server in ("stock", "CoR"):
        cache = place / f"cache-{server}"
        flags = ["--cor-scores", str(scores_file(place))] if server == "CoR" else []
        env = environment(VLLM_CACHE_ROOT=str(cache), TORCHINDUCTOR_CACHE_DIR=str(cache / "inductor"))
        command = ["--served-model-name", "demo", *COMPILED, *flags]
        with serve(MODEL, *command, log=place / "cache.log", env=env) as url:
            right = asyncio.run(alone(url))
        files = [path for path in cache.rglob("*") if path.is_file()]
        for path in files:
            path.write_bytes(b"nonsense")
        row = Row("corrupt compile cache", server, note=f"{len(files)} files overwritten;")
        yield _restarted(row, command, env, place, right)
        shutil.rmtree(cache)
        cache.write_text("a file where the cache folder should be: nothing can be written below it")
        yield _restarted(Row("cache cannot be written", server), command, env, place, right)


def _restarted(row: Row, command: list[str], env: dict[str, str], place: Path, right: dict[str, str]) -> Row:
    note = row.note
    start = time.perf_counter()
    try:
        with serve(MODEL, *command, log=place / "cache.log", env=env) as url:
            row = count(row, PROMPTS, asyncio.run(many(url, PROMPTS)), right)
            row.note = f"{note} started {row.note}".strip()
    except ServerFailed as error:
        row.note = f"{note} {error}".strip()[-200:]
    row.seconds = time.perf_counter() - start
    return row


EXPERIMENTS = ("load", "vanish", "killed", "file", "cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--requests",
        type=int,
        default=2000,
        help="requests of the experiments load and vanish (default: 2000)",
    )
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        plans: dict[str, Iterator[Row]] = {
            "load": on_running_servers("load", load, place, options.requests),
            "vanish": on_running_servers("vanish", vanish, place, options.requests),
            "killed": on_running_servers("killed", killed, place, options.requests),
            "file": file_changes(place),
            "cache": bad_caches(place),
        }
        for name in options.experiments:
            for row in plans[name]:
                rows.append(row)
                print(asdict(row), flush=True)
    table = [asdict(row) for row in rows]
    print(markdown(table))
    print(write_rows("faults", table, device_name("cpu")))


if __name__ == "__main__":
    main()
