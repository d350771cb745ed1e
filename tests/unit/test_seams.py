"""Every name of vLLM that the plugin wraps or reads is there.

tests/parity/test_next_version.py runs this file on the next version of vLLM.
"""

import ast
import inspect
import os
import pkgutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from cor_vllm import plugin
from cor_vllm.serve import compat
from cor_vllm.serve.seams import FLAGS, SEAMS, Seam

PACKAGE = Path(__file__).parents[2] / "cor_vllm"
WRAPPED = [seam for seam in SEAMS if seam.wrapped_by]


def title(seam: Seam) -> str:
    owner = seam.owner or seam.module.rpartition(".")[2]
    return f"{owner}.{seam.names[0]}"


@pytest.mark.parametrize("seam", SEAMS, ids=title)
def test_the_installed_version_has_it(seam):
    if seam not in compat.rows():
        pytest.skip(f"vLLM has it from {seam.since} on")
    name = compat.lacks(seam)
    assert not name, f"vLLM has no {name}, which cor-vllm needs to {seam.why}"


@pytest.mark.parametrize("seam", SEAMS, ids=title)
def test_a_row_says_what_it_is_for(seam):
    assert seam.names and seam.why and not seam.why.endswith(".")
    assert seam.since is None or seam.delete_when, "what one version alone has goes at some time"


def test_no_name_is_in_the_table_twice():
    names = [(seam.module, seam.owner, name) for seam in SEAMS for name in seam.names]
    assert len(names) == len(set(names))


def test_the_class_that_the_layer_check_knows_is_the_tables():
    (seam,) = (seam for seam in SEAMS if seam.module.endswith("expert_substitution"))
    assert seam.names == (compat.SUBSTITUTED_EXPERTS,)


def imports(file: Path) -> set[tuple[str, str]]:
    """What a file imports of vLLM, also inside functions: (module, name), the name empty for `import`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "", alias.name) for alias in node.names}
    return {(module, name) for module, name in found if module.split(".")[0] == "vllm"}


FILES = sorted(file for file in PACKAGE.rglob("*.py") if imports(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_what_a_file_imports_of_vllm_is_in_the_table(file):
    modules = {seam.module for seam in SEAMS}
    known = {(seam.module, name) for seam in SEAMS for name in (*seam.names, seam.owner.split(".")[0])}
    for module, name in imports(file):
        full = f"{module}.{name}".rstrip(".")
        is_module = any(other == full or other.startswith(f"{full}.") for other in modules)
        assert (module, name) in known or is_module, f"{full} is in no row of serve/seams.py"


def test_files_that_import_vllm_are_found():
    found = {str(file.relative_to(PACKAGE)) for file in FILES}
    assert {"serve/router.py", "live/metrics.py", "verify/probe.py", "evaluate/command.py"} <= found


@pytest.mark.parametrize("version", ["0.32.0+cpu", "0.33.0"])
def test_rows_of_later_versions_are_left_out(monkeypatch, version):
    monkeypatch.setattr(compat, "version", lambda name: version)
    later = {seam for seam in SEAMS if seam.since == (0, 33)}
    assert later and set(compat.rows()) == set(SEAMS) - (later if version < "0.33" else set())


# A name of each kind that no vLLM has: its row, behind a name that is there.
NOT_THERE = {
    "vllm.no_module": ("vllm.no_module", "", "a"),
    "vllm.config.NoClass": ("vllm.config", "NoClass", "a"),
    "vllm.config.no_function": ("vllm.config", "", "VllmConfig no_function"),
    "vllm.config.ModelConfig.no_field": ("vllm.config", "ModelConfig", "model no_field"),
    "vllm.v1.request.Request.not_given": ("vllm.v1.request", "Request", "cache_salt not_given"),
    "vllm.v1.worker.worker_base.WorkerBase.__init__.no_parameter": (
        "vllm.v1.worker.worker_base",
        "WorkerBase.__init__",
        "rank no_parameter",
    ),
}


@pytest.mark.parametrize(("name", "row"), NOT_THERE.items(), ids=NOT_THERE)
def test_a_name_that_is_not_there_is_named(name, row):
    module, owner, names = row
    assert compat.lacks(Seam(module, owner, tuple(names.split()), "be tested")) == name


def test_a_package_that_vllm_lacks_is_not_taken_for_a_name_of_its(monkeypatch):
    def import_module(name: str) -> None:
        raise ModuleNotFoundError("No module named 'msgspec'", name="msgspec")

    monkeypatch.setattr(compat.importlib, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match="msgspec"):
        compat.lacks(SEAMS[0])


def test_a_removed_name_is_one_line_with_the_remedy(monkeypatch):
    from vllm.v1.engine.core import EngineCore

    compat.check()
    monkeypatch.delattr(EngineCore, "collective_rpc")
    with pytest.raises(compat.MissingSeam) as caught:
        compat.check()
    message = str(caught.value)
    assert message.startswith("vLLM 0.3")
    assert "has no vllm.v1.engine.core.EngineCore.collective_rpc, which cor-vllm needs to ask" in message
    assert "COR_DISABLE=1" in message and "\n" not in message
    assert isinstance(caught.value, compat.UnsupportedVersion)


def test_install_refuses_a_vllm_without_a_name(monkeypatch):
    from vllm.v1.engine.core import EngineCore

    monkeypatch.setattr(plugin, "_installed", False)
    monkeypatch.setattr(compat, "wrap", lambda seams: pytest.fail("wrapped before all names were there"))
    monkeypatch.delattr(EngineCore, "collective_rpc")
    with pytest.raises(compat.MissingSeam):
        plugin.install()


def test_the_check_at_install_reads_no_source(monkeypatch):
    """Which would take a tenth of a second per class, in every process."""
    plugin.install()
    monkeypatch.setattr(inspect, "getsource", lambda owner: pytest.fail(f"{owner}: mark its row as late"))
    compat.check()


def test_the_check_at_install_imports_nothing_that_wrapping_does_not():
    """The CPU's worker must patch torch before other modules of vLLM's workers are imported."""
    code = (
        "import importlib, sys, torch\n"
        "from cor_vllm.serve import compat\n"
        "from cor_vllm.serve.seams import SEAMS\n"
        "for seam in SEAMS:\n"
        "    if seam.wrapped_by: importlib.import_module(seam.module)\n"
        "from vllm.platforms import current_platform\n"
        "before = set(sys.modules)\n"
        "compat.check()\n"
        "print('more:', *sorted(name for name in set(sys.modules) - before if name.startswith('vllm')))\n"
        "assert 'vllm.v1.worker.cpu_worker' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].split() == ["more:"]


@pytest.mark.parametrize("seam", WRAPPED, ids=title)
def test_after_install_our_function_is_there(seam):
    plugin.install()
    owner = pkgutil.resolve_name(f"{seam.module}:{seam.owner}")
    (name,) = seam.names
    held = inspect.getattr_static(owner, name)
    ours = getattr(held, "__func__", held)
    module = pkgutil.resolve_name(f"cor_vllm.{seam.wrapped_by}").__code__.co_filename
    assert ours.__code__.co_filename == module
    if name in ("add_cli_args", "from_cli_args"):
        assert isinstance(held, staticmethod if name == "add_cli_args" else classmethod)


def test_a_function_is_replaced_wherever_it_was_imported_before():
    plugin.install()
    import vllm.model_executor.layers.fused_moe as package
    from vllm.model_executor.layers.fused_moe import layer

    assert package.FusedMoEFactory is layer.FusedMoEFactory


def test_switched_off_wraps_the_flags_alone(monkeypatch):
    """And looks for nothing, so that it starts on any vLLM."""
    wrapped = []
    monkeypatch.setenv("COR_DISABLE", "1")
    monkeypatch.setattr(plugin, "_installed", False)
    monkeypatch.setattr(compat, "wrap", wrapped.extend)
    monkeypatch.setattr(compat, "check", lambda: pytest.fail("switched off"))

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(compat, "version", version)
    plugin.install()
    assert tuple(wrapped) == FLAGS
