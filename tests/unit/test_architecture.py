"""Who may import whom (architecture: imports go one way), and what `import cor_vllm` needs."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import structure

ROOT = Path(__file__).parents[2]
VLLM_SIDE = ("cor_vllm.plugin", "cor_vllm.serve", "cor_vllm.live", "cor_vllm.verify")  # may name vllm
NEVER_VLLM = {  # of these
    "config.py", "flags.py", "process.py", "objects.py", "observe.py", "seams.py", "compat.py", "state.py",
    "prefix_cache.py", "judge.py",
}  # fmt: skip


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


def files(*rooms: str) -> list[Path]:
    """All modules below these folders; cor_vllm's links are left to the folders that they lead to."""
    found = [file for room in rooms for file in sorted((ROOT / room).rglob("*.py"))]
    return [
        file
        for file in found
        if "cor_vllm/kernels" not in str(file) and "cor_vllm/calibrate" not in str(file)
    ]


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", files("calibrate"), ids=name)
def test_the_calibrator_never_imports_vllm(file):
    assert not {"vllm", "lm_eval"} & roots(file)
    assert not any(n.startswith(VLLM_SIDE) for n in imported(file))


@pytest.mark.parametrize("module", ["sweep", "carrier", "chunk", "prefix", "attention", "measurement"])
def test_the_sweep_takes_nothing_from_its_oracle(module):
    """The sweep is held against `plain`; what both use is in a module of its own."""
    names = {n.split(".")[-1] for n in spelled(ROOT / f"calibrate/interventions/{module}.py")}
    assert "plain" not in names


CALIBRATE = "cor_vllm.calibrate."
ROOMS = (
    "config",
    "model",
    "text",
    "interventions",
    "result",
    "routes",
    "reroute",
)  # each imports from those before it


@pytest.mark.parametrize("file", files(*(f"calibrate/{room}" for room in ROOMS[1:])), ids=name)
def test_the_rooms_of_the_calibrator_point_one_way(file):
    """The command and the pipeline stand above all rooms, and no room imports from them."""
    inside = {n.removeprefix(CALIBRATE).split(".")[0] for n in spelled(file) if n.startswith(CALIBRATE)}
    assert inside <= set(ROOMS[: ROOMS.index(file.parent.name) + 1])


@pytest.mark.parametrize("file", files("benchmarks"), ids=name)
def test_a_benchmark_is_a_program_or_shared_by_programs(file):
    """`python -m benchmarks.NAME` runs every module outside of common/, and common/ imports none of those."""
    shared = file.parent.name == "common"
    assert ("__main__" in file.read_text()) != shared
    of_benchmarks = {n for n in spelled(file) if n.startswith("benchmarks.")}
    assert not shared or all(n.startswith("benchmarks.common") for n in of_benchmarks)


def spelled(file: Path) -> set[str]:
    """Every dotted name in a file's imports, also those for type checkers alone: module.name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("file", files("cor_vllm"), ids=name)
def test_only_the_wings_of_the_server_import_vllm(file):
    """Only serve, live and verify name vLLM, and only evaluate, like the calibrator, transformers."""
    room = file.relative_to(ROOT / "cor_vllm").parts[0]
    if room not in ("serve", "live", "verify", "evaluate", "testing") or file.name in NEVER_VLLM:
        assert "vllm" not in roots(file)
    if room not in ("cli.py", "evaluate", "testing"):
        assert not any(n.startswith(("cor_vllm.calibrate", "cor_vllm.evaluate")) for n in imported(file))
    if room not in ("evaluate", "testing"):
        assert "transformers" not in roots(file)


@pytest.mark.parametrize("file", files("cor_vllm/serve", "cor_vllm/live"), ids=name)
def test_a_server_starts_and_runs_without_the_room_that_doubts_it(file):
    assert not any(n.startswith("cor_vllm.verify") for n in modules(file))
    if file.parent.name == "serve":
        assert not any(n.startswith("cor_vllm.live") for n in modules(file))


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions and those for type checkers count, too."""
    known = structure.modules(ROOT)
    graph = {name: structure.imports(module, known) for name, module in known.items()}
    assert not structure.circles(graph)


@pytest.mark.parametrize("file", files("cor_vllm/evaluate"), ids=name)
def test_the_evaluation_leaves_vllm_to_the_harness(file):
    """It starts engines as users do; only the command asks vLLM's own parser about its flags, and only the
    harness what an engine needs on this machine."""
    assert file.name == "command.py" or "vllm" not in roots(file)
    allowed = {"cor_vllm.serve.config", "cor_vllm.serve.compat", "cor_vllm.live.state"}
    allowed |= {"cor_vllm.serve.cpu"} if file.name == "harness.py" else set()
    assert {n for n in modules(file) if n.startswith(VLLM_SIDE)} <= allowed


def modules(file: Path) -> set[str]:
    """What a file imports, `from package import module` as the module."""
    known = {name(f).removesuffix(".py").replace("/", ".") for f in files("cor_vllm")}
    found = imported(file)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found = (found - {node.module}) | inner if inner else found
    return found


def test_importing_the_package_needs_neither_vllm_nor_transformers():
    code = (
        "import sys, cor_vllm, cor_vllm.scores, cor_vllm.budget, cor_vllm.serve.config, cor_vllm.cli\n"
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
    assert "cor_vllm/calibrate/interventions/plain.py" in names
    assert "cor_vllm/calibrate/data/default_corpus.txt" in names
    assert all(name.startswith(("cor_vllm/", "cor_vllm-")) for name in names)
