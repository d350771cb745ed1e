"""λ and mode while serving, device counters, and the caches' keys, in engines of this process."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs

from cor_vllm import scores
from cor_vllm.serve.config import ConfigError
from cor_vllm.serve.observe import COUNTERS
from cor_vllm.testing.make_scores import make
from tests.parity.engine import ENGINE, PROMPTS

pytestmark = pytest.mark.slow
TOKENS = 12
GREEDY = {"temperature": 0, "ignore_eos": True, "logprobs": 0}
Answer = tuple[list[int], list[float]]


@pytest.fixture(scope="module")
def model(checkpoints) -> Path:
    return checkpoints["qwen3_moe"]


@pytest.fixture(scope="module")
def file(model) -> str:
    return written(model, "control")


def written(model: Path, name: str, **values: Any) -> str:
    path = model.parent / f"{name}.scores.safetensors"
    scores.save(path, make(model, **values))
    return str(path)


def engine(model: Path, file: str | None, engine: dict[str, Any] | None = None, **options: Any) -> LLM:
    additional = {"additional_config": {"cor": {"scores": file, **options}}} if file else {}
    caching = {"enable_prefix_caching": True, "block_size": 32}  # the prompts fill some blocks
    return LLM(model=str(model), **{**ENGINE, **additional, **caching, **(engine or {})})


def core_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core


def ask(llm: LLM, prompts: list[list[int]] = PROMPTS, tokens: int = TOKENS) -> list[Answer]:
    """Greedy tokens and their log-probabilities; the prefix cache is read, as prompt logprobs would not."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, SamplingParams(max_tokens=tokens, **GREEDY), use_tqdm=False)
    answers = []
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        answers.append((ids, [s[t].logprob for s, t in zip(output.outputs[0].logprobs, ids, strict=True)]))
    return answers


def assert_close(got: list[Answer], want: list[Answer]) -> None:
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want]
    for (_, mine), (_, theirs) in zip(got, want, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), atol=1e-4, rtol=0)


def cached_blocks(llm: LLM) -> set[Any]:
    """The keys of the prefix cache's blocks."""
    pool = core_of(llm).scheduler.kv_cache_manager.block_pool
    return {block.block_hash for block in pool.blocks if block.block_hash is not None}


def test_a_change_gives_what_a_fresh_engine_gives(model, file):
    llm = engine(model, file, admin=True)
    core = core_of(llm)
    first, blocks = ask(llm), cached_blocks(llm)
    assert blocks
    assert core.cor_change(5.0, None) == ""
    assert not cached_blocks(llm)
    changed, changed_blocks = ask(llm), cached_blocks(llm)
    assert changed != first
    assert changed_blocks.isdisjoint(blocks)
    (status,) = core.cor_status()
    assert [layer["lambda"] for layer in status["layers"]] == [5.0] * 3
    (warning,) = status["warnings"]
    assert warning.startswith("λ = 5 is beyond the stable range, 0.05 to 0.2: in 3 of 3 layers")
    assert core.cor_change(None, "off") == ""
    off = ask(llm)
    assert core.cor_change(None, "expert") == ""  # λ is remembered
    assert ask(llm) == changed
    assert core.cor_change(0.1, "full") == ""
    assert ask(llm) == first
    assert cached_blocks(llm) == blocks  # the same routing has the same key
    del llm, core

    fresh = engine(model, file, **{"lambda": 5.0})
    assert ask(fresh) == changed
    assert cached_blocks(fresh) == changed_blocks
    del fresh
    stock = engine(model, None)
    assert_close(off, ask(stock))  # up to rounding: the stock kernel adds up the weights in another order
    assert cached_blocks(stock).isdisjoint(blocks | changed_blocks)


def test_a_running_request_goes_on_under_the_new_routing(model, file):
    """Its tokens so far stay, everything else is as if a fresh engine had been given them."""
    llm = engine(model, file, admin=True)
    prompt, core = PROMPTS[-1], core_of(llm)
    llm.llm_engine.add_request("a", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=24, **GREEDY))
    waiting, _ = core.preprocess_add_request(_request(llm, "b", PROMPTS[-2]))
    before: list[int] = []
    while len(before) < 10:
        for output in llm.llm_engine.step():
            before = list(output.outputs[0].token_ids)
    assert core.cor_change(5.0, None) == ""
    core.add_request(waiting)  # hashed under the old routing, by a thread that knew of no change
    after: list[int] = []
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            after = list(output.outputs[0].token_ids)
    assert after[:10] == before
    blocks = cached_blocks(llm)
    del llm, core
    fresh = engine(model, file, **{"lambda": 5.0})
    assert ask(fresh, [prompt + before], tokens=14)[0][0] == after[10:]
    ask(fresh, [PROMPTS[-2]], tokens=2)
    assert blocks >= cached_blocks(fresh)


def _request(llm: LLM, name: str, prompt: list[int]) -> Any:
    params = SamplingParams(max_tokens=2, **GREEDY)
    return llm.llm_engine.input_processor.process_inputs(
        name, {"prompt_token_ids": prompt}, params, supported_tasks=("generate",)
    )


def test_a_models_own_correction_bias_stays_and_groups_follow(checkpoints):
    model = checkpoints["deepseek_v3"]
    file = written(model, "v3")
    llm = engine(model, file, admin=True, weights="fused")
    assert core_of(llm).cor_change(0.7, None) == ""
    assert core_of(llm).cor_change(None, "layer") == ""
    layer = ask(llm)
    assert core_of(llm).cor_change(0.4, "full") == ""
    full = ask(llm)
    assert full != layer
    del llm
    assert ask(engine(model, file, weights="fused", **{"lambda": 0.4})) == full
    assert_close(ask(engine(model, file, weights="fused", mode="off")), layer)


def test_what_cannot_be_changed_is_refused_by_name_and_changes_nothing(model):
    file = written(model, "varied", k=[1, 7, 3])
    llm = engine(model, file, admin=True, swap_rate=0.05)
    core = core_of(llm)
    before, status = ask(llm), core.cor_status()
    for mode in ("off", "expert"):
        assert "another k in decoder layers [0, 1]" in core.cor_change(None, mode)
    assert "cannot be entered" in core.cor_change(None, "random")
    assert "has no λ" in core.cor_change(0.1, "layer")
    assert "float32" in core.cor_change(1e300, None)
    core.vllm_config.kv_transfer_config = object()
    assert "KV connector" in core.cor_change(0.2, None)
    core.vllm_config.kv_transfer_config = None
    assert core.cor_status() == status
    assert ask(llm) == before
    assert core.cor_change(0.2, None) == ""  # one λ in place of each layer's own
    assert core.cor_status()[0]["options"]["swap_rate"] is None


def test_the_files_lambda_is_shown_once_a_mode_has_one(model, file):
    llm = engine(model, file, admin=True, mode="layer")  # it ends with its last name
    core = core_of(llm)
    (status,) = core.cor_status()
    assert status["options"]["lambda"] is None
    assert core.cor_change(None, "full") == ""
    (status,) = core.cor_status()
    assert status["options"]["lambda"] == 0.1 == status["layers"][0]["lambda"]


def test_counters(model):
    """Against sets of what each layer's router was given and what it chose."""
    file = written(model, "counted", k=[1, 7, 3])
    llm = engine(model, file, observe=True, **{"lambda": 0.5})
    core = core_of(llm)
    want = {layer: dict.fromkeys(COUNTERS, 0) for layer in range(3)}

    def watch(layer: int, router: Any) -> None:
        route = router._compute_routing

        def watched(hidden: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            weights, ids = route(hidden, logits, *args, **kwargs)
            own = logits.argsort(dim=-1, descending=True)[:, : ids.shape[1]]
            pairs = zip(ids.tolist(), own.tolist(), strict=True)
            want[layer]["slots"] += ids.numel()
            want[layer]["slots_changed"] += sum(len(set(a) - set(b)) for a, b in pairs)
            want[layer]["distinct_experts"] += len(set(ids.flatten().tolist()))
            want[layer]["router_steps"] += 1
            return weights, ids

        router._compute_routing = watched

    runners = [m for m in core.model_executor.driver_worker.get_model().modules() if hasattr(m, "cor_counts")]
    for layer, runner in enumerate(runners):
        watch(layer, runner.router)
    start = core.cor_counts()
    ask(llm)
    for layer, values in core.cor_counts().items():
        counted = [after - before for before, after in zip(start[layer], values, strict=True)]
        assert counted == list(want[layer].values())
    assert want[1]["slots_changed"] == 0  # all experts are chosen either way
    assert want[2]["slots_changed"] > 0


def test_a_compiled_model_changes_and_counts(model, file):
    """On the CPU the routing is part of the compiled graph: its buffers must not have become constants."""
    compiled = {"enforce_eager": False, "compilation_config": {}}
    llm = engine(model, file, compiled, admin=True, observe=True)
    core = core_of(llm)
    first = ask(llm)
    assert core.cor_change(5.0, None) == ""
    before = core.cor_counts()
    changed = ask(llm)
    assert changed != first
    after = core.cor_counts()
    tokens = sum(map(len, PROMPTS)) + (TOKENS - 1) * len(PROMPTS)
    for layer, values in after.items():
        slots, slots_changed, distinct, steps = (b - a for a, b in zip(before[layer], values, strict=True))
        assert slots == 3 * tokens
        assert 0 < slots_changed < slots
        assert TOKENS <= steps < 2 * TOKENS
        assert 3 * steps <= distinct <= 7 * steps
    del llm, core
    assert_close(changed, ask(engine(model, file, **{"lambda": 5.0})))


def compile_key(model: Path, file: str, **options: Any) -> str:
    settings = {k: v for k, v in ENGINE.items() if k != "compilation_config"}
    args = EngineArgs(str(model), **settings, additional_config={"cor": {"scores": file, **options}})
    return args.create_engine_config().compute_hash()


def test_compiled_graphs_are_kept_apart(model):
    """By the file's content, not its path, and by every option that changes the graph."""
    file = written(model, "compiled")
    first = compile_key(model, file)
    assert compile_key(model, file) == first
    others = [compile_key(model, file, **o) for o in ({"admin": True}, {"observe": True}, {"mode": "off"})]
    scores.save(file, dataclasses.replace(make(model, seed=1)))
    others.append(compile_key(model, file))
    assert len({first, *others}) == 5


def test_admin_needs_something_to_change(model, file):
    for options in ({"static_k": 4}, {"mode": "random"}):
        with pytest.raises(ConfigError, match="leave out admin"):
            compile_key(model, file, admin=True, **options)
