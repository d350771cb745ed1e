"""Lets vLLM's V2 model runner run on a CPU: a Triton backend in name, its kernels in Triton's interpreter.

Python imports this file at its start if the folder is on PYTHONPATH (tests/parity/test_v2_runner.py). vLLM
takes the V2 runner only if Triton has a driver for the device; under TRITON_INTERPRET=1 nothing asks it to
compile. Delete when vLLM's CPU build has V2.
"""

import triton.backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return False


class _Backend:
    driver = _Driver


triton.backends.backends.setdefault("cpu", _Backend)
