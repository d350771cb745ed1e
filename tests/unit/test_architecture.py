"""Who may import whom (architecture: imports go one way), and what `import cor_vllm` needs."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VLLM_SIDE = {
    "plugin.py",
    "router.py",
    "fit.py",
    "loaded.py",
    "cpu.py",
    "worker.py",
    "probe.py",
    "verify.py",
    "control.py",
    "endpoint.py",
    "metrics.py",
}  # the rooms that may name vllm


def imported(file: Path) -> set[str]:
    """Every module that a file imports, also inside functions; type-checking blocks do not count."""
    names: set[str] = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(ast.walk(node))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
    return names


def roots(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(file)}


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").glob("*.py")), ids=lambda f: f.name)
def test_kernels_need_torch_and_triton_alone(file):
    assert roots(file) - sys.stdlib_module_names <= {"torch", "triton", "cor_vllm"}
    assert all(n.startswith("cor_vllm.kernels") for n in imported(file) if n.startswith("cor_vllm"))


@pytest.mark.parametrize("file", sorted((ROOT / "calibrate").glob("*.py")), ids=lambda f: f.name)
def test_the_calibrator_never_imports_vllm(file):
    assert not {"vllm", "lm_eval"} & roots(file)
    assert not {f"cor_vllm.{name.removesuffix('.py')}" for name in VLLM_SIDE} & imported(file)


@pytest.mark.parametrize("file", sorted((ROOT / "cor_vllm").glob("*.py")), ids=lambda f: f.name)
def test_only_the_plugin_imports_vllm(file):
    if file.name not in VLLM_SIDE:
        assert "vllm" not in roots(file)
    if file.name not in {"cli.py"}:
        assert not any(n.startswith(("cor_vllm.calibrate", "cor_vllm.evaluate")) for n in imported(file))
    assert "transformers" not in roots(file)


@pytest.mark.parametrize("file", sorted((ROOT / "cor_vllm" / "evaluate").glob("*.py")), ids=lambda f: f.name)
def test_the_evaluation_leaves_vllm_to_the_harness(file):
    """It starts engines as users do; only the command asks vLLM's own parser about its flags, and only the
    harness what an engine needs on this machine."""
    assert file.name == "command.py" or "vllm" not in roots(file)
    allowed = {"cpu.py"} if file.name == "harness.py" else set()
    assert not {f"cor_vllm.{name.removesuffix('.py')}" for name in VLLM_SIDE - allowed} & imported(file)


def test_importing_the_package_needs_neither_vllm_nor_transformers():
    code = (
        "import sys, cor_vllm, cor_vllm.scores, cor_vllm.budget, cor_vllm.config, cor_vllm.cli\n"
        "import cor_vllm.kernels.dispatch\n"
        "heavy = {'vllm', 'transformers', 'triton', 'matplotlib', 'lm_eval', 'scipy'}\n"
        "heavy &= {m.split('.')[0] for m in sys.modules}\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_folders_are_not_importable_by_themselves(tmp_path):
    """`kernels` is another distribution, which transformers imports; ours must not shadow it."""
    code = (
        "import importlib.util, cor_vllm.kernels.dispatch; assert not importlib.util.find_spec('calibrate')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)


def test_the_wheel_holds_the_linked_folders(tmp_path):
    """What `pip install cor-vllm` brings: kernels, calibrate and the corpus, all of it below cor_vllm."""
    source = tmp_path / "source"
    heavy = shutil.ignore_patterns(
        ".*", "examples", "tests", "build", "demo-output", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=heavy)  # building leaves files beside the source
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "cor_vllm/kernels/cor_topk.py" in names
    assert "cor_vllm/calibrate/plain.py" in names
    assert "cor_vllm/calibrate/data/default_corpus.txt" in names
    assert all(name.startswith(("cor_vllm/", "cor_vllm-")) for name in names)
