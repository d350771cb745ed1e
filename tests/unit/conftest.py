"""What every unit test runs under."""

from collections.abc import Iterator

import pytest
import torch

from cor_vllm.scores import Scores
from cor_vllm.testing.make_scores import make
from cor_vllm.testing.tiny_models import build


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Tiny tensors are slower on several threads, far slower where other work holds the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """Random CEI and uneven k for the tiny Qwen3-MoE."""
    folder = tmp_path_factory.mktemp("model")
    build("qwen3_moe", folder)
    generator = torch.Generator().manual_seed(3)
    return make(folder, k=[2, 3, 4], cei=torch.rand(3, 7, generator=generator))
