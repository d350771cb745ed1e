"""What vLLM's own parser makes of our flags, in every way to give them; no engine."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from cor_vllm.serve import flags
from cor_vllm.serve.config import ConfigError


@pytest.fixture(scope="module")
def parser() -> Any:
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    subparsers = parser.add_subparsers(dest="subparser")
    (serve,) = (command.subparser_init(subparsers) for command in cmd_init())
    if "--cor-scores" not in serve._option_string_actions:
        flags.add(serve)  # in a process in which the plugin is not installed
    return parser


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    file = tmp_path / "server.yaml"
    file.write_text("cor-scores: s\ncor_lambda: 0.05\ncor-admin: true\ncor-observe: false\n")
    return file


def cor(parser: Any, *arguments: object) -> Any:
    """additional_config as an engine would get it."""
    args = parser.parse_args(["serve", "m", *map(str, arguments)])
    flags.merge(args)
    flags.merge(args)  # vLLM asks several times
    return args.additional_config


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cor-scores", "s"],
        ["--cor-scores=s"],
        ["--cor_scores", "s"],
        ["--cor_scores=s"],
        ["--cor-score", "s"],  # argparse completes what is unambiguous
        ["--cor-scores", "t", "--cor-scores", "s"],
        ["--additional-config.cor.scores", "s"],
        ["--additional_config.cor.scores=s"],
        ["--additional-config", '{"cor": {"scores": "s"}}'],
        ["--additional-config", '{"cor": {"scores": "t"}}', "--cor-scores", "s"],
    ],
)
def test_ways_to_give_the_file(parser: Any, arguments: list[str]) -> None:
    assert cor(parser, *arguments) == {"cor": {"scores": "s"}}


def test_a_router_file_needs_no_scores_file(parser: Any) -> None:
    assert cor(parser, "--cor-router", "r", "--cor-admin") == {"cor": {"router": "r", "admin": True}}
    assert cor(parser, "--cor-router", "r", "--cor-scores", "s") == {"cor": {"router": "r", "scores": "s"}}
    given = '{"cor": {"router": "r"}}'
    assert cor(parser, "--additional-config", given, "--cor-admin")["cor"] == {"router": "r", "admin": True}


def test_flags_and_additional_config_are_one_set_of_options(parser: Any) -> None:
    given = {"cor": {"scores": "s", "lambda": 0.1}, "other": 1}
    merged = cor(parser, "--additional-config", json.dumps(given), "--cor-lambda", "0.3", "--cor-admin")
    assert merged == {"cor": {"scores": "s", "lambda": 0.3, "admin": True}, "other": 1}
    merged = cor(parser, "--additional-config.cor.lambda", "0.2", "--cor-scores", "s")
    assert merged == {"cor": {"scores": "s", "lambda": 0.2}}


def test_a_file_of_arguments(parser: Any, yaml: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = {"scores": "s", "lambda": 0.05, "admin": True}
    with caplog.at_level(logging.WARNING, "vllm.cor"):
        assert cor(parser, "--config", yaml) == {"cor": expected}
        assert cor(parser, "--config", yaml, "--cor-lambda", "0.2") == {"cor": expected | {"lambda": 0.2}}
        assert cor(parser, "--cor-lambda", "0.2", "--config", yaml) == {"cor": expected | {"lambda": 0.2}}
    assert not [record for record in caplog.records if record.name == "vllm.cor"]


def test_a_file_that_vllm_ignores_is_named(parser: Any, yaml: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If this fails because the options arrive, vLLM has learnt to read --config=FILE: delete the warning."""
    with caplog.at_level(logging.WARNING, "vllm.cor"):
        assert not cor(parser, f"--config={yaml}")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "vllm.cor"]
    assert line == f"CoR: vLLM ignores --config={yaml} and all that is in it: write --config {yaml}"


@pytest.mark.parametrize(
    "arguments",
    [["--cor-scores"], ["--cor", "s"], ["--cor-s", "s"], ["--no-cor-admin"], ["-cor-scores", "s"],
     ["--cor-lambda", "much"], ["--cor-static-k", "3.0"], ["--cor-mode", "Full"], ["--conf=server.yaml"]],
)  # fmt: skip
def test_what_the_parser_refuses(parser: Any, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cor(parser, *arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cor-lambda", "0.1"], "--cor-lambda needs --cor-scores PATH"),
        (["--cor-admin"], "--cor-admin needs --cor-scores PATH, a file from `cor-vllm calibrate`, or --c"),
        (["--cor-router", "r", "--cor-observe", "--cor-lambda", "1"], "--cor-lambda needs --cor-scores PATH"),
        (["--additional-config", '{"cor": "s"}', "--cor-lambda", "0.1"], '--cor-lambda: "cor" in --addi'),
        (["--additional-config", '{"cor": null}', "--cor-scores", "s"], '--cor-scores: "cor" in --addi'),
    ],
)  # fmt: skip
def test_what_is_refused_with_one_line(parser: Any, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cor(parser, *arguments)
    assert str(caught.value).startswith(message)
