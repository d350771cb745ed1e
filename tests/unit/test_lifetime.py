"""No process outlives the one that started it, whatever ends that one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cor_vllm.commands import lifetime

ROOT = Path(__file__).parents[2]
SLEEP = "import time; time.sleep(600)"
# A child with a child of its own, each in another session, and the second deaf to SIGTERM if asked.
CHILD = f"""
import signal, subprocess, sys, time
if "deaf" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True)
time.sleep(600)
"""
PARENT = f"""
import subprocess, sys, time
from cor_vllm.commands import lifetime
lifetime.guard(); lifetime.guard()
subprocess.Popen([sys.executable, "-c", {CHILD!r}, *sys.argv[2:]], start_new_session=True)
sys.stdin.readline()
if sys.argv[1] == "raise": raise RuntimeError("this ends it")
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="Linux tells who started whom")


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def commands(tree: lifetime.Processes) -> list[str]:
    return [(Path("/proc") / str(pid) / "cmdline").read_text() for pid in tree]


def alive(tree: lifetime.Processes) -> list[int]:
    return [pid for pid, started in tree.items() if lifetime._started(pid) == started]


@pytest.mark.parametrize("end", ["SIGTERM", "SIGKILL", "SIGHUP", "raise", "exit", "deaf"])
def test_a_tree_ends_with_its_root(end: str) -> None:
    arguments = ["raise" if end == "raise" else "exit", *(["deaf"] if end == "deaf" else [])]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments],
        stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip
    tree: lifetime.Processes = {}
    try:
        wait(lambda: len(lifetime.tree([parent.pid])) >= 4)  # the watcher is one of them
        time.sleep(3 * lifetime.POLL_SECONDS)  # what is younger may be missed
        tree = lifetime.tree([parent.pid])
        assert sum("lifetime.py" in command for command in commands(tree)) == 1, "one watcher, asked twice"
        if end.startswith("SIG"):
            parent.send_signal(getattr(signal, end))
        elif end == "deaf":
            parent.kill()
        else:
            parent.stdin.write(b"\n")  # type: ignore[union-attr]
            parent.stdin.flush()  # type: ignore[union-attr]
        parent.wait(60)
        wait(lambda: not alive(tree))
    finally:
        parent.kill()
        for pid in alive(tree):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_that_a_shell_left_is_not_ended(end: signal.Signals) -> None:
    """`server & exec cor-vllm …`: the shell became this process, and its background jobs are our children."""
    source = (
        "import os, subprocess, sys\nfrom cor_vllm.commands import lifetime\n"
        "lifetime.guard()\n"
        f"ours = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n"
        "print(ours.pid, flush=True)\nours.wait()"
    )
    parent = subprocess.Popen(
        ["sh", "-c", 'sleep 600 & echo $!; exec "$0" -c "$1"', sys.executable, source],
        stdout=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert parent.stdout is not None
    theirs, ours = (int(parent.stdout.readline()) for _ in range(2))
    try:
        wait(lambda: ours in lifetime.tree([parent.pid]) and theirs in lifetime.tree([parent.pid]))
        time.sleep(3 * lifetime.POLL_SECONDS)
        watcher = next(
            pid for pid in lifetime.tree([parent.pid])
            if "lifetime.py" in (Path("/proc") / str(pid) / "cmdline").read_text()
        )  # fmt: skip
        parent.send_signal(end)
        parent.wait(60)
        wait(lambda: lifetime._started(ours) is None and lifetime._started(watcher) is None)
        assert lifetime._started(theirs) is not None
    finally:
        parent.kill()
        for pid in (theirs, ours):
            if lifetime._started(pid) is not None:
                os.kill(pid, signal.SIGKILL)


def test_what_was_not_started_here_is_left_alone() -> None:
    """A number that was used again is another process."""
    process = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        lifetime.end({process.pid: lifetime.tree([process.pid])[process.pid] - 1})
        assert process.poll() is None
        lifetime.end_tree(process.pid)
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
