"""Several CPU processes against one: tokens and log-probabilities are those of the single-process engine."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from cor_vllm import scores
from cor_vllm.serve.layers import RoutingError, finish
from cor_vllm.testing import tiny_models
from cor_vllm.testing.make_scores import make
from tests import cores
from tests.parity.engine import ENGINE, PROMPTS, Completion, completion, generate
from tests.parity.test_parity import assert_same
from tests.parity.test_refusals import configured

pytestmark = pytest.mark.slow
TOKENS = 8
K = [1, 6, 3, 2]  # of 6 experts, two layers on each pipeline stage


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    # Mixtral: six experts, which two ranks can share, and no weights that two ranks cannot.
    return tiny_models.build("mixtral", tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=4)


@pytest.fixture(scope="module")
def cor(model) -> dict[str, object]:
    path = model.parent / "scores.safetensors"
    scores.save(path, make(model, k=K))
    return {"scores": str(path)}


@pytest.fixture(scope="module")
def alone(model, cor) -> list[Completion]:
    return generate(model, cor, TOKENS)


@pytest.fixture
def two_ranks(monkeypatch) -> dict[str, Any]:
    # One core per rank; two ranks on one memory node need it said.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", cores.for_ranks(2))
    return {"worker_extension_cls": "tests.parity.cpu_parallel.WorkerExtension"}


def test_expert_parallel(model, cor, alone, two_ranks):
    """Attention on two ranks by heads, three experts on each: the ids we give are those of all ranks."""
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    assert_same(generate(model, cor, TOKENS, **options, **two_ranks), alone)


def test_pipeline_parallel(model, cor, alone, two_ranks):
    """Two layers on each of two stages; compiled, since vLLM's CPU stages crash with --enforce-eager."""
    compiled = {"mode": 2, "backend": "eager", "custom_ops": ["all"]}
    options = {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": compiled}
    assert_same(generate(model, cor, TOKENS, **options), alone)


def stage(*layers: int) -> torch.nn.Module:
    """The MoE layers of a pipeline stage, as far as the check after the load looks at them."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    from cor_vllm.serve.router import CorRouter

    model = torch.nn.ModuleDict()
    for layer in layers:
        runner = MoERunner.__new__(MoERunner)
        torch.nn.Module.__init__(runner)
        runner.router, runner.routed_experts = CorRouter.__new__(CorRouter), torch.nn.Identity()
        runner.router.bias = runner.router.counts = None
        model[str(layer)] = runner
    return model


def test_stages(model, cor, monkeypatch):
    """Each stage must have the file's layers of its own range, and no others; two ranks by heads on each."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    monkeypatch.setattr(MoERunner, "is_monolithic", False)
    engine = configured(model, cor, pipeline_parallel_size=2, tensor_parallel_size=2)
    layers = dict.fromkeys(range(4))
    for rank, held in enumerate(((0, 1), (0, 1), (2, 3), (2, 3))):
        engine.parallel_config.rank = rank
        finish(stage(*held), engine, layers)
        with pytest.raises(RoutingError, match=rf"decoder layers \[{held[0]}\]: the scores file has them"):
            finish(stage(held[1]), engine, layers)


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_data_parallel(model, cor, alone, two_ranks, expert_parallel):
    """Every second prompt on either rank; each layer's experts are on both, by columns or by expert."""
    options = {"data_parallel_size": 2, "enable_expert_parallel": expert_parallel, **two_ranks}
    assert_same(asyncio.run(by_rank(model, cor, options)), alone)


async def by_rank(model: Path, cor: dict[str, object], options: dict[str, Any]) -> list[Completion]:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    args = AsyncEngineArgs(str(model), **{**ENGINE, **options}, additional_config={"cor": cor})
    engine = AsyncLLM.from_engine_args(args)
    asked = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    asked.output_kind = RequestOutputKind.FINAL_ONLY

    async def answer(number: int, prompt: list[int]) -> Completion:
        ask = {"prompt_token_ids": prompt}
        (output,) = [o async for o in engine.generate(ask, asked, str(number), data_parallel_rank=number % 2)]
        return completion(output)

    try:
        return await asyncio.gather(*(answer(i, prompt) for i, prompt in enumerate(PROMPTS)))
    finally:
        engine.shutdown()
