"""How a command ends: its exit code, and one line on stderr for whatever went wrong."""

import contextlib
import errno
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Any, NoReturn

from cor_vllm.errors import CorError, cause, one_line

FAILED = 1
MISROUTED = 3  # `verify` alone: it compared, and a layer was not routed as the file says; usage errors are 2
INTERRUPTED = 128 + signal.SIGINT  # these three are what a shell reports for a process that the signal ended
READER_LEFT = 128 + signal.SIGPIPE
TERMINATED = 128 + signal.SIGTERM
HELP = (
    "Exit codes: 0 done, 1 failed (one line on stderr says why), 2 usage, 3 `verify` found a layer that is "
    "not routed as its files say, 130 interrupted, 141 whoever read the output has left, 143 "
    "terminated. COR_TRACEBACK=1 in the environment prints the traceback of an error, too."
)

# What a server's installation can do without, by the extra that has it.
EXTRAS = {
    "gpu": ("vllm",),
    "calibrate": ("transformers", "matplotlib", "accelerate"),
    "evaluate": ("lm_eval", "scipy", "statsmodels", "sklearn", "datasets"),
}
REMEDIES = {
    errno.ENOSPC: "make room, or write elsewhere",
    errno.EDQUOT: "make room, or write elsewhere",
    errno.EEXIST: "name a folder",
    errno.ENOTDIR: "a part of the path is a file; name a folder",
    errno.EISDIR: "name a file",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "write elsewhere",
    errno.ENOENT: "check the path",
}


def run(command: Callable[[], int]) -> int:
    """Run a command; whatever ends it, its exit code is right and stderr has one line, never a traceback.

    Args:
        command: returns its exit code, or raises.

    Returns:
        The command's own code, or FAILED, INTERRUPTED, READER_LEFT or TERMINATED.

    Raises:
        SystemExit: a usage error (code 2), or a code with which a library ended the process.
    """
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        # A Σ that the terminal's encoding lacks is printed as \u03a3; so is a path's byte that is not UTF-8.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _sigterm_unwinds():
            return _flushed(command)
    except BaseException as error:
        if isinstance(error, SystemExit) and not isinstance(error, Terminated):
            raise
        code, line = _ending(error)
        # If the reader is gone or the disk is full, stderr may be gone, too, and nobody is left to tell.
        with contextlib.suppress(OSError, ValueError):
            print_traceback(error)
            if line:
                print(f"cor-vllm: {line}", file=sys.stderr, flush=True)
        return code
    finally:
        _drop_what_cannot_be_written()


def _open_what_is_closed() -> None:
    """Streams that the process was started without (`>&-`): a file opened later would take their numbers."""
    if sys.stdout is None or sys.stderr is None:
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(number, True)
        os.close(number)
        sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def print_traceback(error: BaseException) -> None:
    """For whoever asked for it by COR_TRACEBACK=1; else nothing."""
    if os.environ.get("COR_TRACEBACK", "") not in ("", "0"):
        traceback.print_exception(error)


def _flushed(command: Callable[[], int]) -> int:
    """Run the command and write out what it printed, while a full disk can still become a line."""
    try:
        code = command()
    except SystemExit:
        _flush(sys.stdout)
        raise
    _flush(sys.stdout)
    return code


def _flush(stream: IO[str] | None) -> None:
    if stream is not None:  # None: the process was started with it closed
        stream.flush()


def _fails(stream: IO[str] | None) -> bool:
    """Whether something that was printed is still waiting because it cannot be written."""
    try:
        _flush(stream)
    except (OSError, ValueError):
        return True
    return False


def _ending(error: BaseException) -> tuple[int, str]:
    """The exit code, and the line to print; the line is empty if there is nothing to say."""
    if isinstance(error, KeyboardInterrupt | Terminated):
        code, how = (
            (TERMINATED, "terminated") if isinstance(error, Terminated) else (INTERRUPTED, "interrupted")
        )
        return code, "; ".join([how, *getattr(error, "__notes__", [])])
    if isinstance(error, BrokenPipeError) and any(map(_reader_left, (sys.stdout, sys.stderr))):
        return READER_LEFT, ""
    return FAILED, f"error: {_reason(error)}"


def _reason(error: BaseException) -> str:
    from pydantic import ValidationError

    if isinstance(error, CorError):
        return one_line(error, limit=2000)
    if isinstance(error, ValidationError):
        return cause(error)
    if _out_of_memory(error):
        return f"out of memory ({one_line(error) or type(error).__name__}); free some, or ask for less"
    if isinstance(error, ModuleNotFoundError) and error.name:
        for extra, packages in EXTRAS.items():
            if error.name in packages:
                return f"this command needs the package {error.name}: pip install 'cor-vllm[{extra}]'"
    if isinstance(error, OSError):
        return _failed_call(error)
    what = ": ".join(filter(None, (type(error).__name__, one_line(error, limit=300))))
    return f"unexpected {what}; COR_TRACEBACK=1 in the environment prints where it comes from"


def _failed_call(error: OSError) -> str:
    if error.strerror is None:  # no call of the system's: requests, transformers and others say what it is
        return one_line(error, limit=300) or type(error).__name__
    path = error.filename  # a call that writes has none
    if path is None and _fails(sys.stdout):
        path = "standard output"
    where = f"{one_line(path, limit=1000)}: " if path is not None else ""
    remedy = REMEDIES.get(error.errno or 0)
    return f"{where}{error.strerror}" + (f"; {remedy}" if remedy else "")


def _out_of_memory(error: BaseException) -> bool:
    # torch, which is slow to import, has a class for the device's memory and none for the host's.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error))
    )


def _reader_left(stream: IO[str] | None) -> bool:
    """Whether the stream is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # type: ignore[union-attr]
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # not a file of the system's, or none at all
        return False


def _drop_what_cannot_be_written() -> None:
    """Python writes what is left when it ends, and would end with a traceback and code 120."""
    for stream in (sys.stdout, sys.stderr):
        if _fails(stream):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Terminated(SystemExit):
    """SIGTERM, which would end the process at once: an exception lets every `finally` have its turn."""


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, frame: Any) -> NoReturn:
    raise Terminated(TERMINATED)
