"""Every command ends with the right code and, where it failed, one line: the real command, real pipes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from requests.exceptions import ConnectionError as NoConnection

from cor_vllm import cli
from cor_vllm import scores as scores_file
from cor_vllm.commands import exits
from cor_vllm.errors import CorError
from cor_vllm.scores import Scores, ScoresError
from cor_vllm.serve.compat import UnsupportedVersion
from cor_vllm.verify.command import VerifyError

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def file(scores: Scores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "scores.safetensors"
    scores_file.save(path, scores)
    return path


def start(arguments: list[object], environment: dict[str, str] | None = None, **options: Any) -> Any:
    """Run Python with `arguments`; what is not redirected is caught."""
    environment = {"COLUMNS": "100", "PYTHONUNBUFFERED": "", **(environment or {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 300} | options
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env={**os.environ, **environment}, **options
    )


def command(*arguments: object, environment: dict[str, str] | None = None, **options: Any) -> Any:
    """Run `cor-vllm` as its console script does."""
    return start(["-m", "cor_vllm.cli", *arguments], environment, **options)


def one_line(done: Any, code: int = 1) -> str:
    text: str = done.stderr.decode()
    assert done.returncode == code, text
    assert text.startswith("cor-vllm: error: ") and text.count("\n") == 1, text
    return text


@pytest.mark.parametrize("name", ["--help", "show"])
def test_a_closed_pipe_ends_quietly(name: str, file: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = command(*{"show": ["show", file]}.get(name, [name]), stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("name", ["--help", "--version", "show"])
def test_a_full_disk_behind_stdout_is_one_line(name: str, unbuffered: str, file: Path) -> None:
    environment = {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        done = command(*{"show": ["show", file]}.get(name, [name]), stdout=full, environment=environment)
    where = "" if unbuffered else "standard output: "  # nothing that was printed waits
    assert f"cor-vllm: error: {where}No space left on device; make room" in one_line(done)


def test_streams_that_cannot_be_written_change_no_exit_code() -> None:
    source = [
        "-c",
        "import sys; from cor_vllm.commands import exits; sys.exit(exits.run(lambda: print(1) or 1 / 0))",
    ]
    assert "unexpected ZeroDivisionError" in one_line(start(source))
    with open("/dev/full", "wb") as full:
        assert start(source, stderr=full).returncode == 1
    closed = start(source, preexec_fn=lambda: (os.close(1), os.close(2)))
    assert (closed.returncode, closed.stdout, closed.stderr) == (1, b"", b"")


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1), (0, 1, 2)])
def test_streams_that_are_closed_from_the_start(closed: tuple[int, ...]) -> None:
    """What is opened later does not take their numbers, and evaluate can turn stdout into stderr."""
    source = (
        "import os, sys; from cor_vllm.commands import exits; from cor_vllm.evaluate.command import _run\n"
        "def main():\n"
        "    with _run(): print('log')\n"
        "    print('table'); return 0 if os.open('/', os.O_RDONLY) > 2 else 1\n"
        "sys.exit(exits.run(main))"
    )
    done = start(["-c", source], preexec_fn=lambda: [os.close(number) for number in closed])
    assert done.returncode == 0
    assert done.stdout == (b"" if 1 in closed else b"table\n")
    assert done.stderr == (b"" if 2 in closed else b"log\n")


def test_a_terminal_without_greek(file: Path) -> None:
    done = command("show", file, environment=ASCII)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"budget exact: \\u03a3 k = 9 of 9" in done.stdout and done.stdout.isascii()
    for environment in (ASCII, {"PYTHONIOENCODING": "ascii:strict"}):
        done = command("calibrate", "--help", environment=environment)
        assert (done.returncode, done.stderr) == (0, b"") and b"mode full, \\u03bb" in done.stdout


def test_a_path_that_is_not_utf_8() -> None:
    source = "from cor_vllm.commands import exits; print(exits.run(lambda: print('wrote \\udcff') or 0))"
    assert start(["-c", source]).stdout == b"wrote \\udcff\n0\n"


@pytest.mark.parametrize("output", ["taken", "taken/figures", "/dev/full", "/dev/full/figures"])
def test_figures_into_what_is_no_folder(
    output: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    assert cli.main(["plot", str(file), "--output", str(tmp_path / output)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("cor-vllm: error: ") and error.count("\n") == 1
    assert output in error and error.endswith("name a folder\n")


def test_a_special_file_is_never_replaced(
    scores: Scores, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ScoresError, match="pipe: is not a regular file"):
        scores_file.save(tmp_path / "pipe", scores)
    assert cli.main(["calibrate", str(tmp_path), "--output", str(tmp_path / "pipe")]) == 1
    assert "pipe: is not a regular file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and not (tmp_path / "pipe").is_file()


@pytest.mark.parametrize(
    ("problems", "error", "code"),
    [
        ([], None, 0),
        (["layer 3: other experts"], None, 3),
        (["layer 3: other experts"], UnicodeEncodeError("ascii", "λ", 0, 1, "no λ"), 1),
        (["layer 3: other experts"], OSError(28, "No space left on device"), 1),
        ([], VerifyError("the engine did not start"), 1),
        ([], UnsupportedVersion("vllm is not installed"), 1),
    ],
)
def test_only_a_comparison_that_failed_means_misrouted(
    problems: list[str],
    error: Exception | None,
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def inspect(llm: object) -> dict[str, object]:
        if error:
            raise error
        return {"problems": problems, "notes": []}

    monkeypatch.setattr("cor_vllm.verify.command._load", lambda *args: (None, []))
    monkeypatch.setattr("cor_vllm.verify.command.inspect", inspect)
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # verify sets both, and this is no process
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    assert cli.main(["verify", "m", "--cor-scores", "s", "--json"]) == code
    assert capsys.readouterr().err.count("\n") == (1 if error else 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", ""],
        ["plot", "", "--output", "figures"],
        ["plot", "s", "--output", ""],
        ["calibrate", "", "--output", "s"],
        ["calibrate", "m", "--output", ""],
        ["calibrate", "m", "--output", "s", "--corpus", ""],
        ["calibrate", "m", "--output", "s", "--token-ids", ""],
        ["verify", "m", "--cor-scores", ""],
        ["evaluate", "m", "--output", "o", "--cor-scores", ""],
        ["evaluate", "m", "--output", ""],
        ["evaluate", "m", "--output", "o", "--data", ""],
        ["tune", "", "--output", "o", "--cor-scores", "s"],
    ],
)
def test_an_empty_argument_is_refused_by_name(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is what a shell makes of an unset variable, and Python of an empty path the working directory."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    before = arguments[arguments.index("") - 1]
    name = before if before.startswith("--") else {"show": "FILE", "plot": "FILE"}.get(before, "MODEL")
    assert f"argument {name}: is empty" in capsys.readouterr().err


class Model(BaseModel):
    number: int


@pytest.mark.parametrize(
    ("fail", "line"),
    [
        (lambda: Model(number="many"), "number: Input should be a valid integer, unable to parse"),
        (lambda: int("many\nlines"), "unexpected ValueError: invalid literal for int() with base 10: "),
        (lambda: {}["a"], "unexpected KeyError: 'a'; COR_TRACEBACK=1"),
        (lambda: fail(AssertionError()), "unexpected AssertionError; COR_TRACEBACK=1"),
        (lambda: recurse(), "unexpected RecursionError: maximum recursion depth exceeded"),
        (lambda: "λ".encode("ascii"), "unexpected UnicodeEncodeError: 'ascii' codec"),
        (lambda: bytearray(2**62), "out of memory (MemoryError)"),
        (lambda: torch.empty(2**58, dtype=torch.uint8), "out of memory ("),
        (lambda: fail(torch.OutOfMemoryError("CUDA out of memory.\nTried")), "out of memory (CUDA out of"),
        (lambda: Path("/dev/null/x").read_text(), "/dev/null/x: Not a directory; a part of"),
        (lambda: Path("/").read_text(), "/: Is a directory; name a file"),
        (lambda: os.write(os.open("/dev/full", os.O_WRONLY), b"x"), "No space left on device; make room"),
        (lambda: fail(NoConnection("no route\nto host")), "no route to host"),
        (lambda: fail(TimeoutError()), "TimeoutError"),
        (lambda: fail(ModuleNotFoundError(name="lm_eval")), "this command needs the package lm_eval: "),
        (lambda: __import__("no_such"), "unexpected ModuleNotFoundError: No module named 'no_such'"),
        (lambda: fail(CorError("two\nlines")), "two lines"),
        (lambda: fail(BrokenPipeError(32, "Broken pipe")), "Broken pipe"),  # a worker's or a server's
        (lambda: fail(asyncio_cancelled()), "unexpected CancelledError"),
    ],
)  # fmt: skip
def test_whatever_ends_a_command_is_one_line(
    fail: Any, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exits.run(fail) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"cor-vllm: error: {line}"), captured.err
    assert len(captured.err) < 600


def fail(error: BaseException) -> int:
    raise error


def recurse() -> int:
    return recurse()


def asyncio_cancelled() -> BaseException:
    import asyncio

    return asyncio.CancelledError()


def test_the_traceback_for_those_who_ask(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COR_TRACEBACK", "1")
    assert exits.run(lambda: {}["a"]) == 1
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("Traceback") and last.startswith("cor-vllm: error: unexpected KeyError: 'a'")


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_gives_every_finally_its_turn(
    number: signal.Signals, code: int, word: str, tmp_path: Path
) -> None:
    ready, cleaned = tmp_path / "ready", tmp_path / "cleaned"
    source = (
        "import sys, time, pathlib\nfrom cor_vllm.commands import exits\n"
        "def command():\n"
        "    try:\n"
        f"        pathlib.Path({str(ready)!r}).touch(); time.sleep(600)\n"
        "    finally:\n"
        f"        pathlib.Path({str(cleaned)!r}).touch()\n"
        "sys.exit(exits.run(command))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", source], stderr=subprocess.PIPE, text=True)
    try:
        while not ready.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (code, f"cor-vllm: {word}\n")
    assert cleaned.exists()


def test_the_callers_own_handling_of_sigterm_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert exits.run(lambda: 7) == 7
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_library_that_ends_the_process_keeps_its_code() -> None:
    with pytest.raises(SystemExit) as stop:
        exits.run(lambda: sys.exit(2))
    assert stop.value.code == 2
