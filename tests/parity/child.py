"""pytest in a process of its own: on another version of vLLM, or under its V2 model runner."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEXT_VERSION = "0.33.0"
V2_ON_CPU = ROOT / "tests" / "parity" / "v2_on_cpu"


def environment(next_version: bool, v2: bool, families: Sequence[str]) -> dict[str, str]:
    """Variables of such a process.

    Args:
        next_version: vLLM's next version, its Python sources with the installed one's CPU libraries
            (tools/vllm-next.sh), which are downloaded into .cache the first time.
        v2: vLLM's V2 model runner, through Triton's interpreter.
        families: the tiny checkpoints to build (conftest.py).
    """
    path = [str(ROOT)]
    # What depends on length is for the tests of the installed version; a step takes long in the interpreter.
    found = {"COR_TEST_FAMILIES": " ".join(families), "COR_TEST_TOKENS": "16"}
    if next_version:
        folder = ROOT / ".cache" / f"vllm-{NEXT_VERSION}"
        build = ["sh", str(ROOT / "tools" / "vllm-next.sh"), sys.executable, str(folder)]
        done = subprocess.run(build, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        path.insert(0, str(folder))
        found["VLLM_TARGET_DEVICE"] = "cpu"
    if v2:
        path.insert(0, str(V2_ON_CPU))
        found |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
        found["COR_TEST_TOKENS"] = "8"
        # Without a visible device vLLM takes Triton although no driver of it is active.
        found["CUDA_VISIBLE_DEVICES"] = ""
    # The test's own checkout last, since the interpreter may have another one installed.
    return {**os.environ, **found, "PYTHONPATH": os.pathsep.join(path)}


def run(variables: dict[str, str], *arguments: str) -> str:
    """What a Python process prints; a failure is one of the test."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, f"exit code {done.returncode}: {(done.stdout + done.stderr)[-6000:]}"
    return done.stdout
