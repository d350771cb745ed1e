"""Environment that must stand before triton, transformers and vllm are imported."""

import os
import signal

from cor_vllm.commands import lifetime

# A background job of a shell ignores these, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

lifetime.guard()  # no engine or server outlives a test run that is killed

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# One engine in the test's own process starts in seconds where one with processes of its own takes a minute.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Where pytest-xdist runs two files at a time, each has one core: threads that spin for each other on shared
# cores would take minutes.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[int(worker[2:]) % len(cores)]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
