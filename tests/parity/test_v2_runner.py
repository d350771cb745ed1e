"""The routing tests again under vLLM's V2 model runner, the default on GPUs, in Triton's interpreter."""

import pytest

from tests.parity.child import environment, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a dozen tests of their own in each of these
FAMILIES = ("qwen3_moe", "gpt_oss")
CHOSEN = (
    "(routes_as or lambda_0) and (qwen3_moe or gpt_oss)",
    # verify and planted faults, in the dtype that GPUs serve
    "bfloat16 and (a_sound_engine and (qwen3_moe or gpt_oss) or is_lost or another_k or sabotaged)",
    "a_change_gives or running_request or test_counters",  # POST /v1/cor, the prefix cache's key, observe
    "transformers_with and qwen3_moe",  # a router file; running_request has another of its tests
    "fits_the_widest",  # --enable-return-routed-experts, which no other runner has: so this one ran
)
PASSED = 2 * len(FAMILIES) + 6 + 4 + 1 + 1


@pytest.mark.parametrize("next_version", [False, True], ids=["0.32", "0.33"])
def test_v2(next_version):
    variables = environment(next_version, v2=True, families=FAMILIES)
    names = ("parity", "verify", "control", "overlay", "routed_experts")
    files = [f"tests/parity/test_{name}.py" for name in names]
    chosen = " or ".join(f"({each})" for each in CHOSEN)
    out = run(variables, "-m", "pytest", "-q", "-k", chosen, *files)
    assert f"{PASSED} passed" in out
