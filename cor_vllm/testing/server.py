"""Runs a `vllm serve` for as long as a with-block lasts.

For tests, benchmarks and the demo, and for authors of other vLLM plugins: it works with any model and flags.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from cor_vllm.commands import lifetime
from cor_vllm.errors import CorError

START_SECONDS = 300


class ServerFailed(CorError):
    """The server ended, or was not ready in time; the message holds the last error line of its log."""


def environment(**changes: str) -> dict[str, str]:
    """The environment that a small CPU server needs, with `changes`; nothing in it concerns routing."""
    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **quiet, **changes}


@contextlib.contextmanager
def serve(
    model: Path,
    *flags: str,
    log: Path,
    env: dict[str, str] | None = None,
    waiting: Callable[[float], None] = lambda seconds: None,
) -> Iterator[str]:
    """Run `vllm serve MODEL FLAGS` and yield its base URL, ending in /v1, once it answers.

    Args:
        model: the model folder.
        flags: what follows the model on the command line, without host and port.
        log: where the server's output goes.
        env: the server's whole environment; if None, `environment()`.
        waiting: called twice a second with the seconds waited so far.

    Raises:
        ServerFailed: the server did not start.
    """
    lifetime.guard()  # vLLM's processes would go on if this one were killed
    port = _free_port()
    vllm = Path(sys.executable).with_name("vllm")
    program = str(vllm) if vllm.exists() else "vllm"  # next to this Python, else on the PATH
    command = [program, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *flags]
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=env or environment(), start_new_session=True
        )
    try:
        _wait(process, port, log, waiting)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(process: subprocess.Popen, port: int, log: Path, waiting: Callable[[float], None]) -> None:
    start = time.monotonic()
    while (waited := time.monotonic() - start) < START_SECONDS:
        if process.poll() is not None:
            raise ServerFailed(f"vllm serve ended with exit code {process.returncode}: {last_error(log)}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        waiting(waited)
        time.sleep(0.5)
    raise ServerFailed(f"vllm serve was not ready after {START_SECONDS} s; its log: {log}")


def last_error(log: Path) -> str:
    """The line of a server's log that says most about why it ended."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line or "Misfit" in line]
    return (errors or lines or ["its log is empty"])[-1]


def _stop(process: subprocess.Popen) -> None:
    """End the server and the engine processes that it started."""
    for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            if sign == signal.SIGKILL or not _group_alive(process.pid):
                return


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
