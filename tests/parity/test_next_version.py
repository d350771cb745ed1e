"""The parity tests again, on vLLM 0.33: its Python sources with 0.32's CPU libraries (tools/vllm-next.sh)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cor_vllm import compat

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a dozen tests of their own in one of these
ROOT = Path(__file__).parents[2]
VERSION = "0.33.0"
FAMILIES = ("qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    folder = ROOT / ".cache" / f"vllm-{VERSION}"
    build = ["sh", str(ROOT / "tools" / "vllm-next.sh"), sys.executable, str(folder)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    # The test's own checkout second, since the interpreter may have another one installed.
    path = os.pathsep.join([str(folder), str(ROOT)])
    families = " ".join(FAMILIES)
    return {**os.environ, "PYTHONPATH": path, "VLLM_TARGET_DEVICE": "cpu", "COR_TEST_FAMILIES": families}


def run(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def test_this_is_the_next_version(environment):
    code = "import vllm, importlib.metadata as m; print(m.version('vllm'), vllm.__file__)"
    version, file = run(environment, "-c", code).split()[-2:]
    assert version == VERSION
    assert f"vllm-{VERSION}" in file


def test_the_names_that_compat_knows_this_version_by(environment):
    code = "import vllm.model_executor.layers.fused_moe.expert_substitution as e; print(*vars(e))"
    assert compat.SUBSTITUTED_EXPERTS in run(environment, "-c", code).split()


def test_parity(environment):
    """Against transformers, and bit-identical with λ = 0; the features that reach deepest into vLLM."""
    families = " or ".join(FAMILIES)
    chosen = f"((routes_as or lambda_0) and ({families})) or load_balancing or trainers_update or inside"
    files = ("test_parity.py", "test_features.py", "test_weights_after_load.py", "test_refusals.py")
    out = run(environment, "-m", "pytest", "-q", "-k", chosen, *(f"tests/parity/{file}" for file in files))
    assert f"{2 * len(FAMILIES) + 4} passed" in out
