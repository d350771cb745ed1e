"""vLLM's own flags on our commands: which were given, and that none contradicts the command itself."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cor_vllm.errors import CorError, first_line


class FlagError(CorError):
    """A flag that cannot be passed on to vLLM's engine: one line with the flag and the remedy."""


class Own(NamedTuple):
    """What a command sets itself."""

    value: object  # the same value may be given again; () is nothing's value
    reason: str  # why no other may be given, and what to do


def given(parser: argparse.ArgumentParser, flags: Sequence[str], own: Mapping[str, Own]) -> dict[str, Any]:
    """What these flags set in vLLM, by the names of its arguments.

    It asks vLLM's parser, so that an abbreviation, an underscore, a dotted flag or a --config FILE says the
    same as the flag that it stands for.

    Args:
        parser: vLLM's, with the flags of its engine; it keeps no default.
        flags: of the command line, without those that the command itself knows.
        own: the arguments that the command sets; every name that starts with `cor_` if it holds "cor_".

    Raises:
        FlagError: a flag says otherwise than the command, or the flags cannot be read.
    """
    for flag in flags:
        if flag.startswith("--config="):
            raise FlagError(f"{flag}: vLLM takes no notice of this form; give --config FILE, with a space")
    parser.usage = "%(prog)s MODEL … [flags of vLLM's engine]"  # all of them would hide the error
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # what is in the result was given
    try:
        found = vars(parser.parse_args(list(flags)))
    except Exception as error:  # of YAML, of files, of vLLM's own checks
        reason = first_line(error)
        raise FlagError(f"{' '.join(flags)}: vLLM cannot read these flags ({reason})") from error
    for name, value in {**found, **_in_additional_config(found)}.items():
        set_here = own.get(name) or (own.get("cor_") if name.startswith("cor_") else None)
        if set_here and value != set_here.value:
            raise FlagError(f"--{name.replace('_', '-')}: {set_here.reason}")
    return found


def _in_additional_config(found: Mapping[str, Any]) -> dict[str, Any]:
    """The options of additional_config["cor"] by the names of their flags."""
    additional = found.get("additional_config")
    options = additional.get("cor") if isinstance(additional, dict) else None
    if options is None:
        return {}
    return {f"cor_{name}": value for name, value in options.items()} if options else {"cor_scores": None}
