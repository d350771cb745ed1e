"""Writes docs/reference/commands.md and flags.md from the parsers, so that the pages say what --help says.

python tools/reference.py            # after a change of a flag; a test compares the pages
"""

import argparse
from pathlib import Path
from typing import Any

from cor_vllm.cli import build_parser
from cor_vllm.commands.exits import HELP
from cor_vllm.serve import flags

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "<!-- Written by tools/reference.py from the parsers: change their texts, not this page. -->"


def commands() -> str:
    """The page of all commands of `cor-vllm`."""
    parts = ["# Commands", NOTE, HELP]
    for name, parser in _subparsers(build_parser()).items():
        parts += [f"## `cor-vllm {name}`", parser.description or ""]
        parts += [_table(parser._actions)]
    return "\n\n".join(part for part in parts if part) + "\n"


def serving_flags() -> str:
    """The page of the --cor-… flags."""
    parser = flags.add(argparse.ArgumentParser(add_help=False))
    return "\n\n".join([
        "# Flags of `vllm serve`",
        NOTE,
        "Every `vllm` subcommand that builds an engine takes these flags: `serve`, `bench`, `run-batch` and "
        "others. `vllm serve --help=CoRConfig` prints them.",
        _table(parser._actions),
    ]) + "\n"  # fmt: skip


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def _table(actions: list[Any]) -> str:
    lines = ["| option | what it does |", "| --- | --- |"]
    for action in actions:
        if action.help is argparse.SUPPRESS or "--help" in action.option_strings:
            continue
        value = "" if action.nargs == 0 else _value(action)
        names = (
            ", ".join(f"`{name}{value}`" for name in action.option_strings)
            or f"`{action.metavar or action.dest}`"
        )
        text = (action.help or "") % {**vars(action), "prog": "cor-vllm"}
        lines.append("| {} | {} |".format(*(cell.replace("|", r"\|") for cell in (names, text))))
    return "\n".join(lines)


def _value(action: Any) -> str:
    if action.choices:
        return " {" + ",".join(map(str, action.choices)) + "}"
    metavar = action.metavar or action.dest.upper()
    return f" {metavar}"


if __name__ == "__main__":
    for name, text in (("commands", commands()), ("flags", serving_flags())):
        (FOLDER / f"{name}.md").write_text(text, encoding="utf-8")
