"""One server, two front ends, two ranks: what GET and POST /v1/cor, /metrics and the log say."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cor_vllm import scores
from cor_vllm.testing.make_scores import make
from cor_vllm.testing.server import serve
from tests import cores
from tests.e2e.test_vllm_commands import ENGINE, of_processes
from tests.parity.engine import PROMPTS

pytestmark = pytest.mark.slow
MODEL = Path(__file__).parents[2] / "examples/demo/model"
KEY = {"Authorization": "Bearer secret"}
LAYERS, TOP_K = 6, 4  # of the demo model
TOKENS = 16
PROMPT = (PROMPTS[-1] * 4)[:200]  # more than one cache block of the CPU's 128 tokens


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    scores.save(path, make(MODEL))
    return path


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("log") / "log"


@pytest.fixture(scope="module")
def server(file, log) -> Iterator[str]:
    flags = [*ENGINE, "--tensor-parallel-size", "2", "--api-server-count", "2", "--api-key", "secret"]
    cor = ["--cor-scores", str(file), "--cor-admin", "--cor-observe"]
    env = of_processes(VLLM_CPU_OMP_THREADS_BIND=cores.for_ranks(2))
    with serve(MODEL, *flags, *cor, log=log, env=env) as url:
        yield url.removesuffix("/v1")


def get(server: str) -> dict[str, Any]:
    return httpx.get(f"{server}/v1/cor", headers=KEY).raise_for_status().json()


def post(server: str, **change: Any) -> httpx.Response:
    return httpx.post(f"{server}/v1/cor", json=change, headers=KEY, timeout=60)


def ask(server: str) -> tuple[str, list[float]]:
    body = {"model": str(MODEL), "prompt": PROMPT, "temperature": 0, "max_tokens": TOKENS, "logprobs": 0,
            "ignore_eos": True}  # fmt: skip
    answer = httpx.post(f"{server}/v1/completions", json=body, headers=KEY, timeout=60).raise_for_status()
    choice = answer.json()["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def metric(server: str, name: str, **labels: str) -> float:
    """The sum over the series of `name` that have `labels`; vLLM leaves /metrics open."""
    total = 0.0
    for line in httpx.get(f"{server}/metrics").text.splitlines():
        match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if match and match[1] == name:
            found = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            if labels.items() <= found.items():
                total += float(match[3])
    return total


def test_the_api_key_guards_the_endpoint(server):
    for answer in (
        httpx.get(f"{server}/v1/cor"),
        httpx.post(f"{server}/v1/cor", json={"lambda": 0.5}),
        httpx.post(f"{server}/v1/cor", json={"lambda": 0.5}, headers={"Authorization": "Bearer guess"}),
    ):
        assert answer.status_code == 401
    assert get(server)["lambda"] == 0.1


def test_get_says_what_every_worker_does(server, file):
    state = get(server)
    config = scores.load(file).config
    assert state["scores_sha256"] == scores.digest(file.read_bytes())
    assert state["fingerprint"] == config.model.fingerprint
    assert (state["mode"], state["lambda"], state["admin"], state["observe"]) == ("full", 0.1, True, True)
    assert [(layer["layer"], layer["k"], layer["lambda"], layer["biased"]) for layer in state["layers"]] == [
        (i, TOP_K, 0.1, True) for i in range(LAYERS)
    ]
    assert {layer["router"] for layer in state["layers"]} == {"CorRouter"}
    assert state["budget"] == state["model_budget"] == LAYERS * TOP_K
    assert [(w["rank"], w["hooked_layers"]) for w in state["workers"]] == [(0, LAYERS), (1, LAYERS)]


def test_the_log_says_it_in_three_lines(server, log):
    start = [line for line in log.read_text().splitlines() if "CoR: " in line and "→" not in line]
    assert 1 <= len(start) <= 3, start
    assert "CoR: full, 6 MoE layers, 6 of them with λ·CEI, Σ k_l = 24" in start[0]


def test_a_change_reaches_both_ranks_and_old_prefixes_are_gone(server, file, tmp_path):
    first = ask(server)
    assert ask(server) == first  # from the prefix cache
    state = post(server, **{"lambda": 5.0}).raise_for_status().json()
    assert state == get(server)
    assert {layer["lambda"] for layer in state["layers"]} == {5.0}
    changed = ask(server)
    assert changed != first
    for _ in range(8):  # connections are spread over the two front ends
        assert get(server) == state
        assert ask(server) == changed
    assert metric(server, "cor_lambda", layer="0") == 5.0
    assert post(server, mode="off").status_code == 200
    off = ask(server)
    assert off not in (first, changed)
    assert post(server, mode="full", **{"lambda": 0.1}).json()["lambda"] == 0.1
    assert ask(server) == first
    assert metric(server, "cor_lambda", layer="0") == 0.1


def test_bad_requests_are_4xx_and_change_nothing(server):
    before = get(server)
    bodies = [b"", b"{", b"[" * 3000, b'{"lambda": NaN}', b'{"lambda": 1e999}', b'{"mode": "\\ud800"}',
              b'{"lambda": 0.1, "mode": "off"}', b'{"lambda": "0.1"}', b"\xff", b"x" * 100_000]  # fmt: skip
    for body in bodies:
        headers = {**KEY, "content-type": "application/json"}
        answer = httpx.post(f"{server}/v1/cor", content=body, headers=headers)
        assert answer.status_code in (400, 413), (body[:50], answer.text)
        assert answer.json()["error"]["message"]
    assert post(server, mode="random").status_code == 409
    assert httpx.put(f"{server}/v1/cor", headers=KEY).status_code == 405
    assert get(server) == before


def test_metrics(server, file):
    state = get(server)
    assert metric(server, "cor_info", mode="full", weights="router", fingerprint=state["fingerprint"]) == 1
    assert metric(server, "cor_info") == 1  # every other series of it is 0
    assert metric(server, "cor_budget") == metric(server, "cor_model_budget") == LAYERS * TOP_K
    assert metric(server, "cor_model_top_k") == TOP_K
    assert metric(server, "cor_top_k") == LAYERS * TOP_K  # one series per layer
    assert metric(server, "cor_hooked_layers", worker="1") == LAYERS

    ask(server)  # fills the prefix cache again
    time.sleep(11)  # two readings of the device's counters
    names = ("cor_expert_activations_total", "cor_slots_total", "cor_slots_changed_total",
             "cor_distinct_experts_total", "cor_router_steps_total")  # fmt: skip
    before = {name: metric(server, name) for name in names}
    ask(server)
    time.sleep(11)
    more = {name: metric(server, name) - before[name] for name in names}
    computed = len(PROMPT) - 128 + TOKENS - 1  # one block comes from the prefix cache
    assert more["cor_expert_activations_total"] == computed * LAYERS * TOP_K
    assert more["cor_slots_total"] == computed * LAYERS * TOP_K
    assert more["cor_router_steps_total"] == TOKENS * LAYERS
    assert 0 < more["cor_slots_changed_total"] < more["cor_slots_total"]
    mean = more["cor_distinct_experts_total"] / more["cor_router_steps_total"]
    assert TOP_K <= mean <= 16
