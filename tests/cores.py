"""The cores that tests give to vLLM's ranks: those that this process may use, which may not be 0 and 1."""

import os


def for_ranks(number: int) -> str:
    """VLLM_CPU_OMP_THREADS_BIND for `number` ranks, a core each; vLLM binds none if there are fewer cores."""
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(map(str, cores[:number])) if len(cores) >= number else "nobind"
