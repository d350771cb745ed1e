"""How much memory this process may still take, by the machine, its control groups and its own limits.

Control groups nest: a process is in one of them, and the limits of all its ancestors hold, too.
/proc/self/cgroup says which group it is, /proc/self/mountinfo where the groups are mounted. Versions 1 and 2
of control groups are read.

Source: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, proc_pid_mountinfo(5).
"""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from cor_vllm.calibrate.config import CalibrationError

ROOT = Path("/")
REFUSALS = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "can't start new thread")
THREAD_BYTES = (8 + 64) * 2**20  # address space of a thread: its stack, and the heap that malloc sets aside


@dataclass(frozen=True)
class Limit:
    """One of the bounds on a process's memory."""

    free: int  # bytes that it still leaves
    total: int  # bytes
    name: str  # as it follows "free"


def host_limit(mapped: int = 0, root: Path = ROOT) -> Limit:
    """The bound that leaves the least memory for what is still to be allocated.

    Args:
        mapped: bytes of files that will be mapped as well; they count as address space.
        root: the root of the file system; tests give another one.
    """
    return min([pages_limit(root), *_process(root, mapped)], key=lambda limit: limit.free)


def pages_limit(root: Path = ROOT) -> Limit:
    """The bound that leaves the least memory for pages that are allocated but were never written to."""
    return min([_machine(root), *_groups(root)], key=lambda limit: limit.free)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host memory was refused, whichever library raised it."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(words in str(error) for words in REFUSALS)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Inside, a refusal of host memory becomes one line; the command itself reports a CUDA device's."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not out_of_memory(error):
            raise
        raise CalibrationError(
            f"host memory ran out {host_limit().name}; give more, or try --device auto, --dtype bfloat16, or "
            "a smaller --max-memory, --num-tokens or --seq-len"
        ) from error


@contextmanager
def device_memory_errors() -> Iterator[None]:
    """Inside, a device that runs out of memory becomes one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise CalibrationError(
            "the device ran out of memory; try a smaller --max-memory, --dtype bfloat16, a shorter "
            "--seq-len, --device auto or --device cpu"
        ) from None


def _machine(root: Path) -> Limit:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    counts = _counts(root / "proc/meminfo")
    free = counts["MemAvailable:"] * 1024 if "MemAvailable:" in counts else total
    return Limit(free, total, "on this machine")


def _groups(root: Path) -> Iterator[Limit]:
    """The limits of the control groups that this process is in, from its own up to the mount's root."""
    for mount, group in _memory_groups(root):
        for folder in [group, *group.parents]:
            limit = _group(folder)
            if limit is not None:
                yield limit
            if folder == mount:
                break


def _memory_groups(root: Path) -> Iterator[tuple[Path, Path]]:
    """(mount, this process's group) of every hierarchy with memory limits; in version 1 that is `memory`."""
    own = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        own["cgroup" if "memory" in controllers.split(",") else "cgroup2" if not controllers else ""] = path
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        top, point = (_unescaped(field) for field in before.split()[3:5])
        kind, _, options = after.split(" ", 2)
        if kind not in own or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        mount = root / point.lstrip("/")
        try:
            relative = PurePosixPath(own[kind]).relative_to(top)
        except ValueError:  # a container that sees its host's path: what it has mounted is its own group
            relative = PurePosixPath()
        inside = ".." not in relative.parts and (mount / relative).is_dir()
        yield mount, mount / relative if inside else mount


def _unescaped(field: str) -> str:
    return field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")


def _group(folder: Path) -> Limit | None:
    """A group's limit in either version, or None if it has none; cached files do not count as taken."""
    limits = [_number(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    known = [limit for limit in limits if limit is not None]
    used = _number(folder / "memory.current")
    if used is None:
        used = _number(folder / "memory.usage_in_bytes")
    if not known or used is None:
        return None
    counts = _counts(folder / "memory.stat")
    total = "total_" if "total_inactive_file" in counts else ""  # version 1: with the groups below
    cached = counts.get(f"{total}active_file", 0) + counts.get(f"{total}inactive_file", 0)
    return Limit(max(0, min(known) - used + cached), min(known), "under the limit of its control group")


def _process(root: Path, mapped: int) -> Iterator[Limit]:
    """The limits of `ulimit -v` and `ulimit -d`; threads and mapped files take address space, too."""
    counts = _counts(root / "proc/self/status")
    threads = torch.get_num_threads() * THREAD_BYTES
    for kind, count, aside, flag in (
        (resource.RLIMIT_AS, "VmSize:", threads + mapped, "-v"),
        (resource.RLIMIT_DATA, "VmData:", threads, "-d"),
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and count in counts:
            free = max(0, limit - counts[count] * 1024 - aside)
            yield Limit(free, limit, f"under the limit of its process (ulimit {flag})")


def _counts(file: Path) -> dict[str, int]:
    """The lines "name number …" of a file; empty if there is no such file."""
    fields = (line.split() for line in _lines(file))
    return {field[0]: int(field[1]) for field in fields if len(field) > 1 and field[1].isdigit()}


def _number(file: Path) -> int | None:
    lines = _lines(file)
    return int(lines[0]) if lines and lines[0].isdigit() else None  # "max" means no limit


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
