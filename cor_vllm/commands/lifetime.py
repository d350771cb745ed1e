"""Every process that we start ends with us, whatever ends us.

vLLM's engine and worker processes go on when the process that started them is killed (seen with 0.32: by
SIGKILL, and by SIGTERM if nothing handles it). A process that dies cannot clean up, so a second one does:
`guard` starts this very file as a program, which keeps a list of all descendants of its parent and, once the
parent is gone, ends those that are left. It works on Linux; elsewhere `guard` does nothing.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

POLL_SECONDS = 0.5  # a process that is younger than this when its ancestors die may be missed
PATIENCE_SECONDS = 5.0  # between SIGTERM and SIGKILL
PROC = Path("/proc")

Processes = dict[int, int]
"""pid → when it was started, in clock ticks: together they name a process uniquely."""

_watchers: dict[int, "subprocess.Popen[bytes]"] = {}  # by the pid that they watch, which a fork changes


def guard() -> None:
    """End all processes that this one starts from now on, and theirs, when it ends; twice is harmless."""
    pid = os.getpid()
    if pid in _watchers or not (PROC / "self/task").is_dir():
        return
    # A shell that became this process (`server & exec cor-vllm …`) left it children that are not ours to end.
    others = [child for child in _children(pid) if _started(child) is not None]
    # It has nothing of ours open, and no signal to our session or our terminal reaches it.
    _watchers[pid] = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *map(str, [pid, *others])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def end_tree(pid: int) -> None:
    """End a process and all its descendants: SIGTERM, then SIGKILL for those that stay."""
    end(tree([pid]))


def tree(pids: Iterable[int]) -> Processes:
    """Those of these processes and of all their descendants that are alive."""
    found: Processes = {}
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        started = _started(pid)
        if started is not None and pid not in found:
            found[pid] = started
            waiting += _children(pid)
    return found


def end(processes: Processes) -> None:
    """End these processes and those that they start meanwhile."""
    for number, patience in ((signal.SIGTERM, PATIENCE_SECONDS), (signal.SIGKILL, PATIENCE_SECONDS)):
        told: Processes = {}
        until = time.monotonic() + patience
        while (processes := _alive(processes)) and time.monotonic() < until:
            for pid in processes.keys() - told.keys():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
            told = {**told, **processes}
            time.sleep(0.05)


def _alive(processes: Processes) -> Processes:
    """Those of them that have not ended, and all descendants of these."""
    return tree(pid for pid, started in processes.items() if _started(pid) == started)


def _started(pid: int) -> int | None:
    """When a process was started, clock ticks since the machine was; None if it has ended."""
    try:
        # The name, in brackets, may hold anything.
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for file in (PROC / str(pid) / "task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def _watch(parent: int, others: Iterable[int]) -> None:
    """Watch `parent`, whose children `others` are not to be ended."""
    left = {pid: _started(pid) for pid in (os.getpid(), *others)}
    known: Processes = {}
    while os.getppid() == parent:
        children = (pid for pid in _children(parent) if pid not in left or _started(pid) != left[pid])
        known = _alive({**known, **tree(children)})
        time.sleep(POLL_SECONDS)
    end(known)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), map(int, sys.argv[2:]))
