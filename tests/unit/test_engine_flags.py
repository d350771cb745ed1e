"""vLLM's flags on our commands: its own parser says what was given, whatever way it was written."""

from pathlib import Path

import pytest

from cor_vllm import cli, register
from cor_vllm.commands.engine_flags import FlagError, Own, given

OWN = {"model": Own("m", "the model is m"), "cor_": Own((), "rows set it"), "seed": Own(0, "give --seed")}


def parse(*flags: str, own: dict[str, Own] = OWN) -> dict[str, object]:
    register()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return given(EngineArgs.add_cli_args(FlexibleArgumentParser()), flags, own)


def test_what_was_given_is_passed_on_and_nothing_else() -> None:
    flags = ["--max-model-len", "1k", "--enforce-eager", "--additional-config.other", "3", "--model", "m"]
    assert parse(*flags) == {
        "max_model_len": 1000,
        "enforce_eager": True,
        "additional_config": {"other": 3},
        "model": "m",
    }
    assert parse() == {}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "other"], "--model: the model is m"),
        (["--model=other"], "--model: the model is m"),
        (["--model", "Qwen/Qwen3-0.6B"], "--model: the model is m"),  # vLLM's default
        (["--cor-mode", "layer"], "--cor-mode: rows set it"),
        (["--cor_scores", "file"], "--cor-scores: rows set it"),
        (["--cor-mod", "layer"], "--cor-mode: rows set it"),
        (["--additional-config", '{"cor": {"mode": "layer"}}'], "--cor-mode: rows set it"),
        (["--additional-config.cor.mode", "layer"], "--cor-mode: rows set it"),
        (["--additional-config", '{"cor": {}}'], "--cor-scores: rows set it"),
        (["--config=file.yaml"], "with a space"),
        (["--config", "missing.yaml"], "cannot read these flags"),
    ],
)
def test_what_the_command_sets_is_refused_by_name(flags: list[str], named: str) -> None:
    with pytest.raises(FlagError) as refused:
        parse(*flags)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_config_file_says_the_same_as_its_flags(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("max-model-len: 300\n")
    assert parse("--config", str(file)) == {"max_model_len": 300}
    file.write_text("max-model-len: 300\nseed: 5\n")
    with pytest.raises(FlagError, match="--seed: give --seed"):
        parse("--config", str(file))


@pytest.mark.parametrize("command", ["evaluate", "tune"])
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "other"], "--model: what is measured"),
        (["--tokenizer", "other"], "--tokenizer: prompts are made with m's own"),
        (["--served-model-name", "other"], "--served-model-name: the table names m"),
        (["--cor-mode", "layer"], "--cor-mode: each row of the table has its own routing"),
        (["--additional-config.cor.mode", "layer"], "--cor-mode: each row"),
        (["--logprobs-mode", "raw_logits"], "--logprobs-mode: what is scored"),
    ],
)
def test_the_commands_refuse_what_contradicts_them(
    command: str, flags: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "m", "--cor-scores", "s", "--output", str(tmp_path / "o"), *flags]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and f"cor-vllm: error: {named}" in captured.err
    assert not (tmp_path / "o").exists()


def test_tune_takes_no_lambda_beside_its_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tune", "m", "--cor-scores", "s", "--output", str(tmp_path / "o"), "--cor-lambda", "0.3"]
    assert cli.main(command) == 1
    assert "--cor-lambda: each row of the table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "other"], "--model: what is verified"),
        (["--cor_scores", "other"], "--cor-scores: give --cor-scores once"),
        (["--additional-config.cor.scores", "other"], "--cor-scores: give --cor-scores once"),
        (["--no-enforce-eager"], "--enforce-eager: the probe watches"),
    ],
)
def test_verify_refuses_what_contradicts_it(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", "m", "--cor-scores", "s", *flags]) == 1
    assert f"cor-vllm: error: {named}" in capsys.readouterr().err
