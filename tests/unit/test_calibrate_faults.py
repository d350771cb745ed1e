"""A calibration that is killed, interrupted, short of disk or memory, or given what it must refuse."""

import io
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from cor_vllm.calibrate import pipeline
from cor_vllm.calibrate.config import CalibrationError, CalibrationOptions
from cor_vllm.calibrate.interventions import state
from cor_vllm.calibrate.interventions.plain import PlainAlgorithm
from cor_vllm.calibrate.interventions.sweep import Sweep
from cor_vllm.calibrate.model import limits
from cor_vllm.calibrate.model.loading import read_config
from cor_vllm.calibrate.model.memory import bytes_per_row
from cor_vllm.calibrate.pipeline import calibrate
from cor_vllm.testing import tiny_models

SMALL: dict[str, Any] = {"num_tokens": 60, "seq_len": 24, "heldout_tokens": 40}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("deepseek_v2", tmp_path_factory.mktemp("models") / "tiny-deepseek")


@pytest.fixture(scope="module")
def result(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("result") / "scores.safetensors"
    calibrate(options(checkpoint, output), QUIET)
    return output


def options(model: Path, output: Path, **values: Any) -> CalibrationOptions:
    return CalibrationOptions(model=str(model), output=output, **(SMALL | values))


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    for algorithm in (PlainAlgorithm, Sweep):

        def interrupted(self: Any, index: int, step: Any = algorithm.step) -> None:
            if index == steps:
                raise KeyboardInterrupt
            step(self, index)

        monkeypatch.setattr(algorithm, "step", interrupted)


@pytest.mark.parametrize(
    ("algorithm", "steps", "last"), [("plain", 0, 2), ("plain", 1, 2), *(("sweep", s, 4) for s in range(4))]
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    checkpoint: Path, result: Path, tmp_path: Path, algorithm: str, steps: int, last: int
) -> None:
    output = tmp_path / "scores.safetensors"
    chosen = options(checkpoint, output, algorithm=algorithm)
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_after(monkeypatch, steps)
        with pytest.raises(KeyboardInterrupt):
            calibrate(chosen, QUIET)
    assert [path.name for path in tmp_path.iterdir()] == (["scores.safetensors.partial"] if steps else [])
    with pytest.MonkeyPatch.context() as monkeypatch:
        done = []
        kind: Any = Sweep if algorithm == "sweep" else PlainAlgorithm
        step = kind.step
        monkeypatch.setattr(kind, "step", lambda self, index: (done.append(index), step(self, index))[1])
        calibrate(chosen, QUIET)
    assert done == list(range(steps, last)), "finished steps are not done again"
    if algorithm == "plain":
        result = tmp_path / "uninterrupted"
        calibrate(options(checkpoint, result, algorithm="plain"), QUIET)
    assert output.read_bytes() == result.read_bytes()
    assert not state.partial_path(output).exists()


def calibrate_quietly(chosen: CalibrationOptions) -> None:
    """What a child process runs."""
    torch.set_num_threads(1)
    calibrate(chosen, QUIET)


def test_killed_at_random_points_it_ends_in_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL, which nothing can catch, at least 20 times; a child that was quicker starts again."""
    output = tmp_path / "scores.safetensors"
    two_chunks = 48 * bytes_per_row(read_config(checkpoint), 24, 4)
    chosen = options(checkpoint, output, max_memory=two_chunks)
    generator = random.Random(0)
    # Forks of a process that has imported everything and run nothing: a run takes a second. A fork of this
    # process would inherit the locks, not the threads, of whatever the tests before have computed with.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def run(seconds: float | None) -> int | None:
        child = context.Process(target=calibrate_quietly, args=(chosen,))
        child.start()
        child.join(seconds)
        if child.is_alive():
            child.kill()
            child.join()
        return child.exitcode

    start = time.monotonic()
    assert run(None) == 0
    duration = time.monotonic() - start
    expected = output.read_bytes()
    output.unlink()
    resumed = kills = 0
    while kills < 20:
        resumed += state.partial_path(output).exists()
        kills += run(generator.uniform(0, duration)) == -signal.SIGKILL
        if output.exists():
            assert output.read_bytes() == expected
            output.unlink()
    assert resumed, "no kill left a state behind, so nothing was resumed"
    assert run(None) == 0
    assert output.read_bytes() == expected


@pytest.mark.parametrize("damage", ["options", "weights", "bytes", "no-resume"])
def test_partial_state_that_does_not_belong_is_ignored(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    model = tiny_models.build("deepseek_v2", tmp_path / "tiny-deepseek")
    output = tmp_path / "scores.safetensors"
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_after(monkeypatch, 1)
        with pytest.raises(KeyboardInterrupt):
            calibrate(options(model, output), QUIET)
    values: dict[str, Any] = {}
    if damage == "options":
        values["delta"] = 0.2
    elif damage == "no-resume":
        values["resume"] = False
    elif damage == "bytes":
        state.partial_path(output).write_bytes(b"half")
    else:  # the same routers, another head: the fingerprint cannot see it
        from safetensors.torch import load_file, save_file

        tensors = load_file(model / "model.safetensors")
        tensors["lm_head.weight"] *= 1.1
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    console = Console(record=True, file=io.StringIO())
    with pytest.MonkeyPatch.context() as monkeypatch:
        interrupt_after(monkeypatch, 0)
        with pytest.raises(KeyboardInterrupt):
            calibrate(options(model, output, **values), console)
    expected = {"options": "another calibration", "weights": "other model weights", "bytes": "damaged"}
    assert expected.get(damage, "loading") in " ".join(console.export_text().split())


def test_a_full_disk_at_the_end(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    output = tmp_path / "scores.safetensors"
    with pytest.raises(CalibrationError, match=r"--output .* cannot be written \(No space left on device\)"):
        calibrate(options(checkpoint, output), QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors.partial"]
    monkeypatch.undo()
    monkeypatch.setattr(Sweep, "step", lambda *args: pytest.fail("everything was measured already"))
    calibrate(options(checkpoint, output), QUIET)


def test_a_full_disk_on_the_way(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second state on no file may grow beyond a few bytes: the first state stays, whole."""
    step = Sweep.step
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(self: Sweep, index: int) -> None:
        step(self, index)
        if index == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    monkeypatch.setattr(Sweep, "step", filling)
    output = tmp_path / "scores.safetensors"
    try:
        with pytest.raises(CalibrationError, match=r"cannot be written \(.*File too large"):
            calibrate(options(checkpoint, output), QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors.partial"]
    monkeypatch.undo()
    console = Console(record=True, file=io.StringIO())
    calibrate(options(checkpoint, output), console)
    assert "resuming from" in console.export_text()


def test_more_host_memory_than_there_is(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = limits.Limit(0, 0, "on a made-up machine")
    monkeypatch.setattr("cor_vllm.calibrate.model.memory.limits", SimpleNamespace(pages_limit=lambda: none))
    expected = (
        r"hidden states take \d+ MB of host memory, 0 MB are free on a made-up machine; lower --num-tokens"
    )
    with pytest.raises(CalibrationError, match=expected):
        calibrate(options(checkpoint, tmp_path / "s"), QUIET)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("unable to mmap 313200600 bytes from file </m>: Cannot allocate memory (12)"),
        RuntimeError("can't start new thread"),
    ],
)
@pytest.mark.parametrize("where", ["read_routers", "load_model", "baseline"])
def test_memory_that_is_refused_is_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    def refused(*args: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, where, refused)
    with pytest.raises(CalibrationError, match=r"^host memory ran out .*; give more, or try --device auto"):
        calibrate(options(checkpoint, tmp_path / "s"), QUIET)


def test_other_errors_are_not_taken_for_memory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (
        RuntimeError("a bug"),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(5, "I/O error"),
    ):

        def broken(*args: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(pipeline, "baseline", broken)
        with pytest.raises(type(error), match=str(error.args[-1])):
            calibrate(options(checkpoint, tmp_path / "s"), QUIET)


def test_losses_that_are_not_finite(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_models.build("olmoe", tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][5] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibrationError, match=r"60 of 60 losses are not finite in torch\.float32"):
        calibrate(options(model, tmp_path / "s"), QUIET)


def test_what_can_be_refused_is_refused_before_loading(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pipeline, "load_model", lambda *args: pytest.fail("the model was loaded"))
        for values, message in (
            ({"output": tmp_path}, "is a folder"),
            ({"output": tmp_path / "no" / "scores"}, "there is no folder"),
            ({"output": tmp_path / "file" / "scores"}, "there is no folder"),
            ({"k_min": 3}, "must hold the model's own 2 experts"),
            ({"seq_len": 513}, "reads at most 512 tokens"),
            ({"num_tokens": 10**6}, "are needed"),
            ({"corpus": "missing.txt"}, "cannot be read"),
        ):
            with pytest.raises(CalibrationError, match=message):
                calibrate(options(checkpoint, **({"output": tmp_path / "s"} | values)), QUIET)


def test_ctrl_c_ends_the_command_with_130_and_no_file(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.safetensors"
    command = [sys.executable, "-m", "cor_vllm.cli", "calibrate", str(checkpoint), "--output", str(output)]
    # One thread: two on a busy machine wait for each other. Enough positions that a layer takes a second.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--num-tokens", "2000", "--seq-len", "64"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        deadline = time.monotonic() + 60
        while not state.partial_path(output).exists():
            assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == (
        "cor-vllm: interrupted; the same command goes on from where it stopped"
    )
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors.partial"]
