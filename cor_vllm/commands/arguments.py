"""Types of the command line's arguments, for what argparse takes without a word."""

import argparse
from pathlib import Path


def given(text: str) -> str:
    """An argument that is not empty, as that of an unset shell variable is."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a name, or leave the option out")
    return text


def path(text: str) -> Path:
    """A path that is not empty: Python takes an empty one for the working directory."""
    return Path(given(text))
