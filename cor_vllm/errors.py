"""The base class of every error that a user is shown as one line, and how other text becomes one line."""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pydantic import ValidationError


class CorError(ValueError):
    """Something that cannot be done as asked: one line that names the cause and the remedy.

    The command line prints it and exits with 1. It is a ValueError, so that a caller who does not know this
    package catches it as one.
    """


class Invalid(NamedTuple):
    """The first thing that is wrong in values that pydantic refused."""

    where: tuple[str, ...]  # names and indexes on the way to the value; empty: the values as a whole
    message: str  # what the value must be
    value: str  # what it is, as Python writes it


def invalid(error: "ValidationError") -> Invalid:
    """The first of a ValidationError's findings, each part of it one line."""
    first: Any = error.errors(include_url=False)[0]
    return Invalid(
        tuple(one_line(part) for part in first["loc"]),
        one_line(first["msg"].removeprefix("Value error, "), limit=300),
        one_line(repr(first.get("input"))),
    )


def cause(error: BaseException) -> str:
    """What an error of any library says, as one line: pydantic's first finding, else the last line."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        where, message, value = invalid(error)
        return f"{'.'.join(where)}: {message}, got {value}" if where else f"{error.title}: {message}"
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[-1], limit=1000)


def first_line(error: BaseException) -> str:
    """The first line of what an error of any library says; its type's name if it says nothing."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0], limit=1000)


def one_line(text: object, limit: int = 120) -> str:
    """`text` without line breaks and control characters, cut at `limit` characters."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= limit else line[:limit] + "…"
