"""Tiny checkpoints of all families, built once; COR_TEST_FAMILIES names some of them (test_next_version)."""

import os
from pathlib import Path

import pytest

from tests import tiny_models


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    families = os.environ.get("COR_TEST_FAMILIES", " ".join(tiny_models.FAMILIES)).split()
    return {family: tiny_models.build(family, root / family) for family in families}
