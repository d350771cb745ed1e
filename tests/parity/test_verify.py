"""Routing that is not what the file says is found, whatever way it came about."""

import dataclasses
import gc
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from cor_vllm import scores
from cor_vllm.cli import main
from cor_vllm.kernels.scoring import Scoring
from cor_vllm.serve.layers import RoutingError, gates
from cor_vllm.serve.router import CorRouter
from cor_vllm.testing.make_scores import config_of, make
from cor_vllm.verify import command as verify
from cor_vllm.verify import probe
from tests.parity.engine import generate, start
from tests.parity.test_parity import varied, written

pytestmark = pytest.mark.slow


def problems(llm) -> list[str]:
    return verify.inspect(llm)["problems"]


SOUND = [
    ("qwen3_moe", "float32", {}),
    ("deepseek_v3", "float32", {"lambda": 0.2}),  # groups, correction bias, scaled weights
    ("glm4_moe", "float32", {"mode": "expert"}),
    ("gpt_oss", "float32", {"weights": "fused"}),
    ("olmoe", "float32", {"mode": "random", "seed": 3}),
    ("deepseek_v2", "float32", {"mode": "layer"}),
    ("mixtral", "float32", {"static_k": 3}),
    ("qwen2_moe", "float32", {"swap_rate": 1.0}),
    # vLLM's router for CPUs computes in the dtype of the logits: softmax over the chosen experts, or over all
    # of them by the log of a sum. Where the score is the model's own, its weights are what is served.
    ("qwen3_moe", "bfloat16", {}),
    ("qwen3_moe", "bfloat16", {"mode": "layer", "admin": True}),  # our step, with a bias of zeros
    ("mixtral", "bfloat16", {"mode": "layer"}),
    ("olmoe", "bfloat16", {"mode": "off"}),
    ("gpt_oss", "bfloat16", {}),
    ("qwen2_moe", "bfloat16", {"mode": "expert"}),
    ("deepseek_v2", "bfloat16", {}),
    ("deepseek_v3", "bfloat16", {"mode": "layer"}),
    ("glm4_moe", "bfloat16", {}),
    ("qwen3_moe", "float16", {"mode": "off"}),
    ("mixtral", "float16", {}),
    ("olmoe", "float16", {}),
    ("gpt_oss", "float16", {"static_k": 3}),
]


@pytest.mark.parametrize(("family", "dtype", "options"), SOUND)
def test_a_sound_engine_passes(checkpoints, family, dtype, options):
    folder = checkpoints[family]
    values = make(folder, k=varied(folder))
    report = verify.inspect(start(folder, {**written(folder, values), **options}, dtype=dtype))
    gc.collect()
    assert report["problems"] == []
    layers = report["layers"]
    assert [row["layer"] for row in layers] == values.layer_index.tolist()
    assert all(row["as_expected"] == 1 and row["lambda_0"] == 1 and row["modular"] for row in layers)
    assert all(row["weights_error"] <= 1e-6 for row in layers)  # our own step is exact in every dtype
    assert all(row["tokens"] == verify.PROMPTS * verify.PROMPT_TOKENS for row in layers)
    own_score = options.get("mode") in ("layer", "off") or "static_k" in options
    assert any(row["changed"] > 0 for row in layers) != own_score
    text = verify.render(report)
    assert f"All {len(layers)} layers of 1 worker(s) are routed as the scores file says." in text
    assert text.count("| yes     | CorRouter |") == len(layers)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def engine(checkpoints, request):
    """An engine to sabotage, and what mends it again."""
    folder = checkpoints["qwen3_moe"]
    llm = start(folder, written(folder, make(folder, k=varied(folder))), dtype=request.param)
    assert problems(llm) == []
    return llm


def layer_of(llm, number: int):
    return llm.apply_model(lambda model: model.model.layers[number].mlp.experts)[0]


def test_a_router_that_was_replaced_afterwards(engine):
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    layer = layer_of(engine, 1)
    own = layer.router
    layer.router = CPURouter(top_k=own.top_k, global_num_experts=7)
    try:
        found = problems(engine)
    finally:
        layer.router = own
    assert any("layers.1.mlp.experts" in p and "routed by CPURouter" in p for p in found)


def test_a_bias_that_is_lost(engine):
    """Everything is in its place, and the routing is the model's own: only the experts tell."""
    router = layer_of(engine, 2).router
    kept = router.bias.clone()
    router.bias.zero_()
    try:
        found = problems(engine)
    finally:
        router.bias.copy_(kept)
    assert found and all(
        "layers.2.mlp.experts" in p and "other experts than the file says" in p for p in found
    )


def test_another_k(engine):
    router = layer_of(engine, 0).router
    router.top_k += 1
    try:
        found = problems(engine)
    finally:
        router.top_k -= 1
    assert any("layers.0.mlp.experts" in p and "k is 2, the file says 1" in p for p in found)


@pytest.mark.parametrize(("attribute", "value"), [("scale", 1.01), ("renormalize", False)])
def test_weights_that_vllm_would_not_give(engine, attribute, value):
    router = layer_of(engine, 0).router
    right = router.scoring
    router.scoring = dataclasses.replace(right, **{attribute: value})
    try:
        found = problems(engine)
    finally:
        router.scoring = right
    assert found and all("layers.0" in p and "with λ = 0 it routes otherwise than vLLM" in p for p in found)


def test_the_correction_bias_is_recorded_whole():
    """A record keeps few tokens, but all experts."""
    own = torch.rand(probe.ROWS + 100)
    router = CorRouter.__new__(CorRouter)
    router.scoring = Scoring("sigmoid", renormalize=True, correction_bias=own)
    assert torch.equal(probe._scoring(router).correction_bias, own)


LOGITS = {  # what a router may make of its input, and what is said
    "zeros": (lambda logits: torch.zeros_like(logits), "the same for all experts, so it chooses nothing"),
    "bias": (lambda logits: logits[:1].expand_as(logits), r"the same for all of 192 tokens, so it chooses"),
    "nan": (lambda logits: torch.full_like(logits, float("nan")), "its router's logits are not finite"),
}


@pytest.mark.parametrize("made", LOGITS)
def test_a_router_that_does_not_look_at_the_token(engine, monkeypatch, made):
    """The selection is right, for it is the selection of such logits."""
    change, says = LOGITS[made]
    (gate,) = engine.apply_model(lambda model: gates(model)["model.layers.1.mlp.experts"])
    forward = gate.forward

    def changed(hidden):
        logits, bias = forward(hidden)
        return change(logits).contiguous(), bias

    monkeypatch.setattr(gate, "forward", changed)
    found = [p for p in problems(engine) if "layers.1.mlp" in p]
    assert re.search(says, found[0])


def test_an_expert_kernel_that_routes_inside_itself(engine, monkeypatch):
    layer = layer_of(engine, 1)
    method = type(layer.routed_experts.quant_method)
    stock = layer.router.stock

    def apply_monolithic(self, layer, x, router_logits, input_ids=None):
        weights, ids = stock._compute_routing(x, router_logits, None)
        return self.apply(layer, x, weights, ids, None, None)

    monkeypatch.setattr(method, "is_monolithic", property(lambda self: True))
    monkeypatch.setattr(method, "apply_monolithic", apply_monolithic)
    found = problems(engine)
    assert any("the expert kernel routes inside itself" in p for p in found)
    assert any("its router was never asked" in p for p in found)


def test_the_sabotaged_engine_is_sound_again(engine):
    assert problems(engine) == []


@pytest.fixture(scope="module")
def own_score(checkpoints):
    """An engine whose experts vLLM's own router chooses and weighs, in bfloat16, by the log of a sum."""
    folder = checkpoints["olmoe"]
    values = make(folder, k=varied(folder))
    llm = start(folder, {**written(folder, values), "mode": "layer"}, dtype="bfloat16")
    assert problems(llm) == []
    return llm


def test_weights_of_vllm_that_are_scaled(own_score, monkeypatch):
    """Less than what vLLM's router rounds away in this dtype, and still found."""
    router = layer_of(own_score, 2).router
    compute = router._compute_routing

    def scaled(*args, **options):
        weights, ids = compute(*args, **options)
        return weights * 1.001, ids

    monkeypatch.setattr(router, "_compute_routing", scaled)
    found = problems(own_score)
    assert found and all("layers.2" in p and "weights differ from the expected ones" in p for p in found)


def test_a_router_of_vllm_that_weighs_otherwise(own_score, monkeypatch):
    monkeypatch.setattr(layer_of(own_score, 2).router.stock, "renormalize", True)
    found = problems(own_score)
    assert found and all("layers.2" in p and "with λ = 0 it routes otherwise than vLLM" in p for p in found)


def test_experts_that_vllm_would_not_choose(own_score, monkeypatch):
    router = layer_of(own_score, 2).router
    compute = router._compute_routing

    def lowest(hidden, logits, *args, **options):
        return compute(hidden, -logits, *args, **options)

    monkeypatch.setattr(router, "_compute_routing", lowest)
    assert any("layers.2" in p and "other experts than the file says" in p for p in problems(own_score))


@pytest.mark.parametrize(
    ("family", "says"),
    [("qwen3_moe", "the same for all experts"), ("gpt_oss", "the same for all of 16 tokens")],
)
def test_a_checkpoint_without_a_router_does_not_start(checkpoints, tmp_path, family, says):
    """Zeros in the file, which the file's fingerprint is made of; GPT-OSS adds a bias to them."""
    folder = shutil.copytree(checkpoints[family], tmp_path / family)
    weights = load_file(folder / "model.safetensors")
    (name,) = (n for n in weights if n.endswith(("layers.1.mlp.gate.weight", "layers.1.mlp.router.weight")))
    weights[name].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RoutingError, match=rf"layers\.1\.mlp\.experts: its router's logits are {says}"):
        start(folder, written(folder, make(folder)))


def test_dummy_weights_are_no_fault(checkpoints):
    folder = checkpoints["gpt_oss"]
    llm = start(folder, written(folder, make(folder)), load_format="dummy", dtype="bfloat16")
    assert problems(llm) == []


def test_a_worker_checks_itself_before_it_serves(checkpoints, monkeypatch):
    """A router that forgets its bias would serve the model's own routing: the engine does not start."""
    folder = checkpoints["olmoe"]
    route = CorRouter._route

    def forgetful(self, logits, indices_type, is_padding):
        self.bias = torch.zeros_like(self.bias)
        return route(self, logits, indices_type, is_padding)

    monkeypatch.setattr(CorRouter, "_route", forgetful)
    with pytest.raises(
        RoutingError, match=r"experts: \d+ of \d+ tokens have other experts than the file says"
    ):
        generate(folder, written(folder, make(folder, k=varied(folder))), 1)


WITHOUT_PLUGINS = """
import os, sys
from cor_vllm import register
register()
from vllm import LLM
os.environ.update({environment})
if __name__ == "__main__":
    from cor_vllm.verify import command as verify
    llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128,
        kv_cache_memory_bytes=2**26, additional_config={{"cor": {{"scores": sys.argv[2]}}}})
    print(len(verify.inspect(llm)["problems"]), "problems")
"""


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"VLLM_PLUGINS": "none_of_ours"}, "0 problems"),  # routed all the same
        ({"COR_DISABLE": "1"}, "COR_DISABLE is set in a worker but not where the engine was configured"),
    ],
)
def test_a_worker_process_that_would_not_load_the_plugin(checkpoints, tmp_path, environment, says):
    folder = checkpoints["olmoe"]
    file = written(folder, make(folder, k=varied(folder)))["scores"]
    script = tmp_path / "script.py"
    changes = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", **environment}
    script.write_text(WITHOUT_PLUGINS.format(environment=changes))
    run = subprocess.run(
        [sys.executable, str(script), str(folder), file],
        capture_output=True,
        text=True,
        timeout=300,
        env={**verify.os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    assert says in run.stdout + run.stderr, (run.stdout + run.stderr)[-3000:]


def test_the_command(checkpoints, tmp_path):
    """As a user runs it: the report and exit code 0, then JSON, then a file of another model."""
    folder = checkpoints["qwen3_moe"]
    file = written(folder, make(folder, k=varied(folder)))["scores"]

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "cor_vllm.cli",
            "verify",
            str(folder),
            "--dtype",
            "float32",
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = run("--cor-scores", file, "--cor-mode", "expert")
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'mode": "expert' in done.stdout
    assert done.stdout.rstrip().endswith("routed as the scores file says.")
    done = run("--cor-scores", file, "--json")
    assert json.loads(done.stdout)["problems"] == []
    other = make(folder)
    other = dataclasses.replace(
        other,
        config=type(other.config).model_validate(
            config_of(folder, other.k.tolist(), architecture="OlmoeForCausalLM")
        ),
    )
    scores.save(tmp_path / "other.safetensors", other)
    done = run("--cor-scores", str(tmp_path / "other.safetensors"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("cor-vllm: error: ")
    assert "architecture: the scores file has OlmoeForCausalLM" in done.stderr.splitlines()[-1]


def test_flags_that_no_command_knows(capsys):
    with pytest.raises(SystemExit):
        main(["show", "x.safetensors", "--tensor-parallel-size", "2"])
    assert "unrecognized arguments: --tensor-parallel-size 2" in capsys.readouterr().err
