"""Tiny checkpoints of all families, built once; COR_TEST_FAMILIES names some of them (test_next_version)."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cor_vllm.testing import tiny_models


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    families = os.environ.get("COR_TEST_FAMILIES", " ".join(tiny_models.FAMILIES)).split()
    return {family: tiny_models.build(family, root / family) for family in families}


@pytest.fixture(scope="module", autouse=True)
def own_cache_size() -> Iterator[None]:
    """The size of the KV cache in ENGINE: the variable for servers, a GiB each, would outweigh it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
        yield
