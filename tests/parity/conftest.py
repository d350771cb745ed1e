"""Tiny checkpoints of all six families, built once."""

from pathlib import Path

import pytest

from tests import tiny_models


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: tiny_models.build(family, root / family) for family in tiny_models.FAMILIES}
