"""What an evaluation is given and cannot use: one line, and nothing is measured."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from cor_vllm import cli
from cor_vllm import scores as scores_file
from cor_vllm.evaluate import engines, pipeline, runs
from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.evaluate.claims import Claim
from cor_vllm.evaluate.conditions import Condition
from cor_vllm.evaluate.options import EvaluateOptions, available, read_sources
from cor_vllm.testing.make_scores import make
from tests import fake_server
from tests.fake_server import Fake

MODEL = Path("examples/demo/model")
TASK = "examples/demo/tasks/demo_tail.yaml"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    scores_file.save(path, make(MODEL))
    return path


@pytest.fixture
def server() -> Iterator[Fake]:
    with fake_server.running(Fake("model", "model")) as fake:
        yield fake


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("cor-vllm: error: ") and "Traceback" not in captured.err, captured.err
    return lines[-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--limit", "0"], "--limit 0: "),
        (["--limit", "-3"], "--limit -3: "),
        (["--batch-size", "0"], "--batch-size 0: "),
        (["--permutations", "-1"], "--permutations -1: "),
        (["--seed", "-1"], "--seed -1: "),
        (["--cor-lambda", "nan"], "--cor-lambda nan: "),
        (["--cor-lambda", "-1"], "--cor-lambda -1.0: "),
        (["--max-model-len", "0"], "--max-model-len 0: "),
        (["--conditions", ""], "--conditions quick"),  # nothing is the default
        (["--conditions", "full,"], "--conditions : unknown"),
        (["--tasks", ""], "--tasks : unknown"),
        (["--tasks", "trivia"], "--tasks trivia: unknown"),
        (["--data", "missing"], "--data missing: there is no such folder"),
        (["--device", "cuda"], "--device: is of --backend transformers"),
        (["--also", "a=x", "--also", "a=y"], "--also a=…: is there twice"),
        (["--also", "a=missing.safetensors"], "missing.safetensors: cannot be read"),
        (["--backend", "transformers", "--max-num-seqs", "2"], "no engine to pass it to"),
    ],
)
def test_bad_values(
    flags: list[str], said: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def never(*arguments: object) -> None:
        raise EvaluationError("--conditions quick")

    monkeypatch.setattr("cor_vllm.evaluate.pipeline.in_own_process", never)
    line = ["evaluate", str(MODEL), "--cor-scores", str(file), "--output", str(tmp_path / "o")]
    assert cli.main([*line, "--tasks", TASK, *flags]) == 1
    assert said in refused(capsys)


@pytest.mark.parametrize("flags", [["--grid", "0.1,x"], ["--grid", ""], ["--limit", "1"], ["--limit", "0"]])
def test_bad_values_of_tune(
    flags: list[str], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["tune", str(MODEL), "--cor-scores", str(file), "--output", str(tmp_path / "o"), "--tasks", TASK]
    assert cli.main([*line, *flags]) == 1
    assert flags[0] in refused(capsys)


def test_task_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], server: Fake) -> None:
    task = tmp_path / "own.yaml"
    for text in ("", "a: [", "- a\n- b\n", "task: mine\n", "task: mine\nmetric_list: []\n"):
        task.write_text(text)
        line = ["evaluate", str(MODEL), "--output", str(tmp_path / "o"), "--tasks", str(task)]
        assert cli.main([*line, "--server", f"standard={server.url}"]) == 1
        assert "not a task of lm-evaluation-harness" in refused(capsys)


def test_outputs_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], server: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(output: Path) -> int:
        line = ["evaluate", str(MODEL), "--output", str(output), "--tasks", TASK, "--limit", "2"]
        return cli.main([*line, "--server", f"standard={server.url}"])

    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == 1
    assert "a file of that name is there" in refused(capsys)
    assert run(tmp_path / "file" / "folder") == 1
    assert "Not a directory" in refused(capsys)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        assert run(tmp_path / "o") == 1
    assert "No space left on device" in refused(capsys)
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["cache"], "no half of a result"
    assert run(tmp_path / "o") == 0
    capsys.readouterr()
    result = runs.path_of(tmp_path / "o", "standard")
    result.write_text(result.read_text()[:200])
    assert run(tmp_path / "o") == 1
    assert "standard.json: not a result of this version" in refused(capsys)
    result.unlink()
    monkeypatch.setattr("cor_vllm.evaluate.runs.key_of", lambda settings: "0" * 64)
    (tmp_path / "o/cache" / f"standard-demo_tail-{'0' * 12}_rank0.db").write_text("not a data base")
    assert run(tmp_path / "o") == 1
    assert "the answers of an interrupted run cannot be read" in refused(capsys)


def test_an_unknown_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str], server: Fake) -> None:
    model = tmp_path / "model"
    model.mkdir()
    line = ["evaluate", str(model), "--output", str(tmp_path / "o"), "--tasks", TASK]
    assert cli.main([*line, "--server", f"standard={server.url}"]) == 1
    assert "no usable tokenizer" in refused(capsys)


def test_the_plugin_must_not_be_switched_off(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COR_DISABLE", "1")
    line = ["evaluate", str(MODEL), "--cor-scores", str(file), "--output", str(tmp_path), "--tasks", TASK]
    assert cli.main([*line, "--conditions", "full"]) == 1
    assert "COR_DISABLE is set, under which full would be stock routing" in refused(capsys)
    line[0] = "tune"
    assert cli.main(line) == 1
    assert "COR_DISABLE is set" in refused(capsys)


class Engine:
    """An engine whose configuration does not hold what it was given: as under COR_DISABLE in a worker."""

    def __init__(self, options: dict[str, object] | None) -> None:
        self.model = self
        self.llm_engine = self.vllm_config = self
        self.additional_config = None if options is None else {"cor": options}


def test_an_engine_that_does_not_route_as_its_row_is_called() -> None:
    with pytest.raises(EvaluationError, match="the engine is not what the row 'full' is called"):
        engines.check_routing(Engine(None), "full", Claim({"mode": "full"}))
    engines.check_routing(Engine(None), "standard", Claim(None))


def test_an_engine_process_gives_its_reason(tmp_path: Path) -> None:
    """Its own error, and not that it ended."""
    options = EvaluateOptions(model=str(MODEL), output=tmp_path, scores=tmp_path / "missing")
    with pytest.raises(EvaluationError, match=r"standard: .*missing: cannot be read.*goes on from here"):
        engines.in_own_process(options, Condition("standard", ""))


def _hears_the_terminal(options: object, condition: object, reasons: Connection) -> None:
    reasons.send(str(signal.getsignal(signal.SIGINT) is signal.SIG_IGN))
    sys.exit(1)


def test_the_engines_process_leaves_an_interrupt_to_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both get a terminal's Ctrl-C; the engine's would print a traceback."""
    monkeypatch.setattr(engines, "_engine_main", _hears_the_terminal)
    before = signal.getsignal(signal.SIGINT)
    options = EvaluateOptions(model=str(MODEL), output=tmp_path)
    with pytest.raises(EvaluationError, match="standard: True;"):
        engines.in_own_process(options, Condition("standard", ""))
    assert signal.getsignal(signal.SIGINT) is before


def test_stdout_is_for_the_table(tmp_path: Path) -> None:
    """Not even what C code and other processes write to descriptor 1 gets there."""
    code = (
        "import os, subprocess\n"
        "from cor_vllm.evaluate.command import _run\n"
        "with _run():\n"
        "    print('python'); os.write(1, b'c\\n'); subprocess.run(['echo', 'child'], check=True)\n"
        "print('table')\n"
        "os.write(1, b'after\\n')\n"
    )
    done = subprocess.run([sys.executable, "-uc", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["table", "after"]
    assert sorted(done.stderr.split()) == ["c", "child", "python"]


def test_options_that_are_hardly_meant_are_said_once(file: Path, tmp_path: Path) -> None:
    def said(**more: float) -> list[str]:
        options = EvaluateOptions.of(model=str(MODEL), output=tmp_path, scores=file, **more)
        rows = [row for row in available(options) if row.name in ("standard", "full", "expert")]
        assert len(rows) == 3
        return pipeline._doubts(rows, read_sources(options))

    (line,) = said(lambda_=1000.0)
    assert line.startswith("λ = 1000 is beyond the stable range, 0.05 to 0.2")
    assert said() == []
