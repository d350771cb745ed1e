"""The command line: what users script against."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cor_vllm import __version__, cli
from cor_vllm import scores as scores_file
from cor_vllm.calibrate.config import CalibrationOptions, parse_bytes
from cor_vllm.testing import tiny_models

SMALL = ["--num-tokens", "60", "--seq-len", "24", "--heldout-tokens", "40"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("qwen3_moe", tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture(scope="module")
def result(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("result") / "scores.safetensors"
    assert cli.main(["calibrate", str(checkpoint), "--output", str(output), *SMALL]) == 0
    return output


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("cor-vllm: error: "), captured.err
    return lines[0]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"cor-vllm {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["calibrate"], ["calibrate", "m"], ["show"], ["no-such-command"],
                                  ["calibrate", "m", "--output", "o", "--algorithm", "magic"],
                                  ["calibrate", "m", "--output", "o", "--num-tokens", "many"]])  # fmt: skip
def test_usage_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: cor-vllm" in capsys.readouterr().err


def options_of(command: str) -> list[argparse.Action]:
    actions = cli.build_parser()._actions
    commands = next(action for action in actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices[command]._actions


def test_every_option_is_offered_and_explained_with_its_default() -> None:
    actions = {action.dest: action for action in options_of("calibrate") if action.dest != "help"}
    assert set(actions) == set(CalibrationOptions.model_fields)
    for name, field in CalibrationOptions.model_fields.items():
        help_text = actions[name].help
        assert help_text
        if name in ("model", "output"):
            continue
        assert "default: " in help_text, name
        stated = help_text.rsplit("default: ", 1)[1].rstrip(")")
        if isinstance(field.default, bool):
            assert stated.startswith("--resume" if field.default else "off"), name
        elif name == "max_memory":
            assert parse_bytes(stated) == field.default
        elif isinstance(field.default, int | float):
            assert float(stated) == field.default, name
        elif isinstance(field.default, str):
            assert stated == field.default, name


def test_calibrate_writes_a_valid_file(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = scores_file.load(result)
    assert scores.num_layers == 3 and scores.num_experts == 7
    assert scores.config.calibration.model_dump()["num_tokens"] == 60


def test_show(result: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["show", str(result)]) == 0
    shown = capsys.readouterr().out
    scores = scores_file.load(result)
    assert "tiny-qwen3 (Qwen3MoeForCausalLM): 3 MoE layers, 7 experts, top_k 3" in shown
    for m in range(3):
        row = next(line for line in shown.splitlines() if line.startswith(f"│     {m} │"))
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[1] == f"{scores.rki[m].item():.3g}"
        assert cells[3] == str(scores.k[m].item())
        assert cells[5] == f"{int((scores.cei_count[m] > 0).sum())}/7"
    for mode in ("stock", "layer", "expert", "full", "random"):
        assert f"│ {mode}" in shown
    assert "slots that λ changes" in shown and "held-out loss, nats: 40 positions, 4 hard" in shown


def test_show_json(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", str(result), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    scores = scores_file.load(result)
    assert shown["config"] == json.loads(scores.config.model_dump_json(by_alias=True))
    assert [layer["k"] for layer in shown["layers"]] == scores.k.tolist()
    assert [layer["layer"] for layer in shown["layers"]] == [0, 1, 2]
    assert all(len(layer["swap_rate"]) == 5 for layer in shown["layers"])


def change(result: Path, tmp_path: Path, **calibration: object) -> scores_file.Scores:
    import dataclasses

    scores = scores_file.load(result)
    config = scores.config.model_dump(by_alias=True)
    heldout = config["heldout"]["modes"]["full"]["all"]
    heldout["difference"], heldout["sem"] = calibration.pop("full", (0.0, 0.1))  # type: ignore[misc]
    config["calibration"] |= calibration
    return dataclasses.replace(scores, config=type(scores.config).model_validate(config))


def test_warnings(result: Path, tmp_path: Path) -> None:
    from cor_vllm.calibrate.result.show import warnings

    scores = scores_file.load(result)
    quiet: dict[str, object] = {"sensitivity_easy_sem": [0.0] * 3, "cei_split_half": 0.9}
    assert warnings(change(result, tmp_path, **quiet)) == []
    (line,) = warnings(change(result, tmp_path, **quiet, full=(0.21, 0.1)))
    assert "mode full is worse than stock routing by 0.2100 ± 0.1000 nats" in line
    assert warnings(change(result, tmp_path, **quiet, full=(0.19, 0.1))) == []
    wide = [abs(scores.sensitivity_easy[0].item()), 0.0, 0.0]
    unclear = quiet | {"sensitivity_easy_sem": wide}
    (line,) = warnings(change(result, tmp_path, **(unclear | {"intensity": "ratio"})))
    assert "not distinguishable from zero in 1 of 3 layers" in line
    assert warnings(change(result, tmp_path, **unclear)) == []
    (line,) = warnings(change(result, tmp_path, **(quiet | {"cei_split_half": 0.17})))
    assert "too few hard positions for CEI" in line and "correlate at 0.17" in line
    assert warnings(change(result, tmp_path, **(quiet | {"cei_split_half": 0.67}))) == []
    (line,) = warnings(change(result, tmp_path, **(quiet | {"cei_split_half": 0.66})))


def test_how_many_positions_would_do(result: Path, tmp_path: Path) -> None:
    """The example of the efficacy study: halves of 51 at 0.17 need about 1,000."""
    from cor_vllm.calibrate.result.show import reliability

    counts: dict[str, object] = {"num_hard": 102, "num_positions": 1024}
    text = reliability(change(result, tmp_path, cei_split_half=0.17, **counts))
    assert "reliability of 0.29; 0.8 takes about 1000: --num-tokens 10000" in text
    text = reliability(change(result, tmp_path, cei_split_half=0.17, positions="p.json", **counts))
    assert text.endswith("0.8 takes about 1000: name more in --positions")
    counts["cei_split_half_rank"] = None
    for negative in (0.0, -0.1, -0.87, -1.0):
        text = reliability(change(result, tmp_path, cei_split_half=negative, **counts))
        assert f"correlate at {negative:.2f}, so CEI is not reproducible; how many" in text
        assert "cannot be told" in text and "reliability" not in text
    assert reliability(change(result, tmp_path, cei_split_half=None)) == ""


def test_only_settings_beyond_noise_are_called_better(result: Path) -> None:
    import dataclasses

    from cor_vllm.calibrate.result.show import better_flags
    from cor_vllm.metadata import AlternativeInfo

    scores = scores_file.load(result)
    assert scores.config.heldout
    trials = [
        AlternativeInfo(flags="--shrink", difference=-0.02, sem=0.011),
        AlternativeInfo(flags="--cor-mode off", difference=-0.02, sem=0.009),
        AlternativeInfo(flags="--cor-mode layer", difference=-0.03, sem=0.001),
    ]
    heldout = scores.config.heldout.model_copy(update={"alternatives": trials})
    scores = dataclasses.replace(scores, config=scores.config.model_copy(update={"heldout": heldout}))
    assert better_flags(scores) == [
        "--cor-mode layer (-0.0300 ± 0.0010 nats)",
        "--cor-mode off (-0.0200 ± 0.0090 nats)",
    ]


def test_plot(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", str(result), "--output", str(tmp_path / "p"), "--layers", "0", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6 == len(list((tmp_path / "p").iterdir()))


@pytest.mark.parametrize("command", [["show"], ["plot", "--output", "figures"]])
def test_unreadable_scores(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").write_bytes(b"bad")
    for name in ("bad", "missing"):
        assert cli.main([*command, str(tmp_path / name)]) == 1
        assert str(tmp_path / name) in one_error(capsys)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--delta", "0"], "--delta 0 perturbs nothing"),
        (["--num-tokens", "0"], "--num-tokens: Input should be greater than or equal to 1"),
        (["--k-min", "9"], "--k-min 9"),
        (["--corpus", "missing.txt"], "--corpus missing.txt: cannot be read"),
        (["--output", "no-folder/scores"], "there is no folder no-folder"),
        (["--device", "nonsense"], "--device nonsense"),
    ],
)
def test_one_line_for_what_cannot_be_done(
    extra: list[str], message: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["calibrate", str(checkpoint), "--output", str(tmp_path / "s"), *extra]) == 1
    error = capfd.readouterr().err.strip().splitlines()
    assert error[-1].startswith("cor-vllm: error: ") and message in error[-1]
    assert len([line for line in error if "Traceback" in line]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "--dtype bfloat16"),
        (scores_file.ScoresError("scores: cei_raw: nan"), "cei_raw: nan"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_late_failures_are_one_line(
    error: Exception,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("cor_vllm.calibrate.pipeline.calibrate", fail)
    assert cli.main(["calibrate", "m", "--output", str(tmp_path / "s")]) == 1
    assert message in one_error(capsys)


def test_calibrate_names_the_settings_that_did_better(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cor_vllm.calibrate.result.show.SIGNIFICANT", -100
    )  # random weights: let noise pass for it
    output = tmp_path / "scores"
    sizes = ["--num-tokens", "60", "--heldout-tokens", "200", "--seq-len", "32"]
    assert cli.main(["calibrate", str(checkpoint), "--output", str(output), *sizes]) == 0
    calibrated = capsys.readouterr().err
    assert cli.main(["show", "--json", str(output)]) == 0
    better = json.loads(capsys.readouterr().out)["better"]
    lines = [line for line in calibrated.splitlines() if line.startswith("would have done better")]
    assert better and lines == [f"would have done better on the held-out text: {one}" for one in better]


def test_a_gpu_out_of_memory_on_the_way(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cor_vllm.calibrate.interventions.sweep import Sweep

    step = Sweep.step

    def out_of_memory(self: Sweep, index: int) -> None:
        if index == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        step(self, index)

    monkeypatch.setattr(Sweep, "step", out_of_memory)
    output = tmp_path / "scores.safetensors"
    assert cli.main(["calibrate", str(checkpoint), "--output", str(output), "--num-tokens", "60"]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("cor-vllm: error: the device ran out of memory; try a smaller --max-memory")
    assert "Traceback" not in "".join(error)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors.partial"]


@pytest.mark.parametrize("damage", ["empty", "config", "no weights", "half the weights", "index", "a file"])
def test_unreadable_models(
    damage: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "model", tmp_path / "out" / "scores"
    output.parent.mkdir()
    shutil.copytree(checkpoint, folder)
    if damage == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif damage == "config":
        (folder / "config.json").write_text('{"model_type": ')
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "half the weights":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif damage == "index":
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text("{}")
    else:
        folder = folder / "config.json"
    assert cli.main(["calibrate", str(folder), "--output", str(output)]) == 1
    error = capfd.readouterr().err.strip().splitlines()
    assert error[-1].startswith("cor-vllm: error: ") and str(folder) in error[-1], error
    assert not any("Traceback" in line for line in error)
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("tokens", ["1", "2"])
def test_too_few_hard_tokens(
    tokens: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "scores"
    assert cli.main(["calibrate", str(checkpoint), "--output", str(output), "--num-tokens", tokens]) == int(
        tokens == "1"
    )
    error = capsys.readouterr().err
    if tokens == "1":
        assert "no hard position among 1: their losses are too few or too equal; raise --num-tokens" in error
        assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named(result: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.delitem(sys.modules, "cor_vllm.calibrate.result.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["plot", str(result), "--output", str(tmp_path)]) == 1
    assert "needs the package matplotlib: pip install 'cor-vllm[calibrate]'" in one_error(capsys)


def test_help_and_show_import_neither_vllm_nor_transformers(result: Path) -> None:
    code = (
        "import sys, cor_vllm, cor_vllm.cli\n"
        "assert 'torch' not in sys.modules\n"
        f"cor_vllm.cli.main(['show', {str(result)!r}])\n"
        "assert not {'vllm', 'transformers', 'matplotlib'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
