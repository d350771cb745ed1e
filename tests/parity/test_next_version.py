"""The parity tests again, on vLLM 0.33: its Python sources with 0.32's CPU libraries (tools/vllm-next.sh)."""

import pytest

from cor_vllm.serve import compat
from tests.parity.child import NEXT_VERSION, environment, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a dozen tests of their own in one of these
FAMILIES = ("qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    return environment(next_version=True, v2=False, families=FAMILIES)


def test_this_is_the_next_version(variables):
    code = "import vllm, importlib.metadata as m; print(m.version('vllm'), vllm.__file__)"
    version, file = run(variables, "-c", code).split()[-2:]
    assert version == NEXT_VERSION
    assert f"vllm-{NEXT_VERSION}" in file


def test_the_names_that_compat_knows_this_version_by(variables):
    code = "import vllm.model_executor.layers.fused_moe.expert_substitution as e; print(*vars(e))"
    assert compat.SUBSTITUTED_EXPERTS in run(variables, "-c", code).split()


def test_every_name_that_the_plugin_wraps_or_reads_is_there(variables):
    """serve/seams.py, and no row is left out as one of a later version."""
    assert " skipped" not in run(variables, "-m", "pytest", "-q", "tests/unit/test_seams.py")


def test_parity(variables):
    """Against transformers, and bit-identical with λ = 0; the features that reach deepest into vLLM."""
    families = " or ".join(FAMILIES)
    chosen = f"((routes_as or lambda_0) and ({families})) or load_balancing or trainers_update or inside"
    chosen += " or (transformers_with and gpt_oss) or after_new_weights"  # a router file
    names = ("parity", "features", "weights_after_load", "refusals", "overlay")
    files = [f"tests/parity/test_{name}.py" for name in names]
    out = run(variables, "-m", "pytest", "-q", "-k", chosen, *files)
    assert f"{2 * len(FAMILIES) + 6} passed" in out
