"""Errors that a user is shown have one base class and are one line."""

import ast
import builtins
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError, model_validator

from cor_vllm.errors import CorError, cause, invalid, one_line

ROOT = Path(__file__).parents[2]
FILES = [file for room in ("cor_vllm", "calibrate", "kernels") for file in (ROOT / room).rglob("*.py")]


def test_every_error_of_ours_is_a_cor_error():
    """By base class in the source: a class that only Python's own exceptions stand above is found."""
    classes = {
        node.name: {ast.unparse(base) for base in node.bases}
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    errors = {"CorError"}
    while more := {name for name, bases in classes.items() if bases & errors} - errors:
        errors |= more
    assert {"ScoresError", "RoutingError", "UnsupportedVersion", "CalibrationError"} <= errors
    builtin = {
        name
        for name, value in vars(builtins).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    others = {name for name, bases in classes.items() if bases & builtin} - errors
    assert not others, others


class Inner(BaseModel):
    number: int


class Outer(BaseModel):
    inner: list[Inner]

    @model_validator(mode="after")
    def _never_three(self) -> "Outer":
        if len(self.inner) == 3:
            raise CorError("three\nis refused")
        return self


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"inner": [{"number": "x\ny"}]}, (("inner", "0", "number"), "valid integer", "'x\\ny'")),
        ({"inner": [{"number": 1}] * 3}, ((), "three is refused", "{'inner': ")),
        ({"inner": "y" * 5000}, (("inner",), "valid list", "…")),
    ],
)
def test_a_validation_error_becomes_its_first_finding(values, expected):
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(values)
    found = invalid(caught.value)
    where, message, value = expected
    assert found.where == where and message in found.message and value in found.value
    assert "\n" not in found.message + found.value and len(found.value) < 200


def test_the_cause_that_a_library_names():
    """pydantic's own last line is an address, vLLM's and torch's is the cause."""
    for values, expected in (({"inner": [{"number": "x"}]}, "inner.0.number: Input should be a valid"),
                             ({"inner": [{"number": 1}] * 3}, "Outer: three is refused")):  # fmt: skip
        with pytest.raises(ValidationError) as caught:
            Outer.model_validate(values)
        assert cause(caught.value).startswith(expected) and "http" not in cause(caught.value)
    assert cause(RuntimeError("the engine failed\nno memory\n")) == "no memory"
    assert cause(RuntimeError()) == "RuntimeError"


def test_one_line_takes_breaks_control_characters_and_length_away():
    assert one_line("a\n b\t\x1b[31mc\ud800") == "a b ?[31mc?"
    assert one_line("x" * 200) == "x" * 120 + "…"
