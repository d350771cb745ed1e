"""GET and POST /v1/cor against engines of cardboard, under vLLM's own exception handlers."""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from cor_vllm.live.endpoint import CorEndpoint, Engines, build_router
from cor_vllm.live.metrics import Activations, Metrics
from cor_vllm.live.state import combine

JSON = {"content-type": "application/json"}


class Cardboard:
    """Two engines of two workers that keep λ, mode and router, and refuse mode `expert`.

    Those of `router` have a router file, for layer 3, which only the second worker holds.
    """

    def __init__(
        self, admin: bool = True, observe: bool = False, router: bool = False, scores: bool = True
    ) -> None:
        self.engine_core = self
        self.scores = scores
        self.options = [{"lambda": 0.1, "mode": "full"} if scores else {} for _ in range(2)]
        self.routers: list[bool | None] = [True if router else None] * 2
        self.fixed = {"sha256": "a" * 64 if scores else None, "swap_rate": None, "static_k": None,
                      "weights": "router", "seed": 0, "admin": admin, "observe": observe}  # fmt: skip
        self.changes = 0
        self.counts = [[0, 0, 0, 0], [0, 0, 0, 0]]

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        return [getattr(self, method)(engine, *args) for engine in range(2)]

    def cor_status(self, engine: int) -> list[dict[str, Any]]:
        options = {"lambda": None, "mode": None, **self.fixed, **self.options[engine]}
        options["router_on"] = self.routers[0] is not False  # a worker may have lost its router all the same
        layers = [
            {"layer": i, "name": f"layers.{i}", "router": "CorRouter", "kernel": "K", "k": k,
             "lambda": 0.0 if options["mode"] in ("off", "layer") else options["lambda"], "biased": True}
            for i, k in ((1, 2), (3, 4))
        ] if self.scores else []  # fmt: skip
        router = {"sha256": "c" * 64, "fingerprint": "d" * 64, "layer": 3, "on": self.routers[engine],
                  "drift": 0.25, "objective": "epo", "warnings": ["it harms"]}  # fmt: skip
        high = self.scores and options["lambda"] > 0.2
        worker = {"version": "1", "fingerprint": "f" * 64, "model_top_k": 3, "options": options,
                  "warnings": [f"λ = {options['lambda']}"] if high else []}  # fmt: skip
        held = [None, router if self.routers[engine] is not None else None]
        return [{**worker, "rank": rank, "layers": layers[rank:], "router": held[rank]} for rank in range(2)]

    def cor_check(self, engine: int, lambda_: float | None, mode: str | None, router: bool | None) -> str:
        if router is not None and self.routers[engine] is None:
            return "this server has no router file"
        return "layers [1] have another k" if mode == "expert" and engine == 1 else ""

    def cor_change(self, engine: int, lambda_: float | None, mode: str | None, router: bool | None) -> str:
        self.changes += 1
        if router is not None:
            self.routers[engine] = router
        new = {"lambda": lambda_, "mode": mode}
        self.options[engine].update({name: value for name, value in new.items() if value is not None})
        return ""

    def cor_counts(self, engine: int) -> dict[int, list[int]]:
        return {1: list(self.counts[engine])}


def serve(cardboard: Cardboard) -> TestClient:
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False, additional_config={"cor": {}})
    CorEndpoint().attach_router(app)
    init_exception_handler(app)
    app.state.cor_engines = Engines(cardboard)
    app.state.registry = CollectorRegistry()
    app.state.cor_metrics = Metrics(asyncio.run(app.state.cor_engines.state()), app.state.registry)
    return TestClient(app, raise_server_exceptions=False)


def sample(client: TestClient, name: str, **labels: str) -> float | None:
    return client.app.state.registry.get_sample_value(name, labels)


def test_get_shows_what_the_workers_say():
    client = serve(Cardboard())
    answer = client.get("/v1/cor").json()
    assert answer["mode"] == "full" and answer["lambda"] == 0.1
    assert answer["scores_sha256"] == "a" * 64 and answer["fingerprint"] == "f" * 64
    assert [layer["k"] for layer in answer["layers"]] == [2, 4]
    assert (answer["budget"], answer["model_budget"], answer["model_top_k"]) == (6, 6, 3)
    assert [(w["engine"], w["rank"], w["hooked_layers"]) for w in answer["workers"]] == [
        (0, 0, 2), (0, 1, 1), (1, 0, 2), (1, 1, 1),
    ]  # fmt: skip
    assert "lambda_" not in json.dumps(answer) and "scores" not in answer  # no path of the server's


def test_a_change_reaches_every_engine_and_is_read_back():
    cardboard = Cardboard()
    client = serve(cardboard)
    answer = client.post("/v1/cor", json={"lambda": 0.25})
    assert answer.status_code == 200
    assert answer.json() == client.get("/v1/cor").json()
    assert cardboard.options == [{"lambda": 0.25, "mode": "full"}] * 2
    assert sample(client, "cor_lambda", layer="3") == 0.25
    assert client.post("/v1/cor", json={"mode": "off"}).json()["lambda"] is None
    assert sample(client, "cor_lambda", layer="3") == 0
    info = {"weights": "router", "scores_sha256": "a" * 64, "fingerprint": "f" * 64, "version": "1"}
    assert sample(client, "cor_info", mode="off", **info) == 1
    assert sample(client, "cor_info", mode="full", **info) == 0
    back = client.post("/v1/cor", json={"mode": "full"}).json()
    assert back["lambda"] == 0.25  # what a request leaves out stays


def test_where_one_engine_refuses_none_changes():
    cardboard = Cardboard()
    answer = serve(cardboard).post("/v1/cor", json={"mode": "expert", "lambda": 0.3})
    assert answer.status_code == 409
    assert "another k" in answer.json()["error"]["message"]
    assert cardboard.changes == 0
    assert cardboard.options == [{"lambda": 0.1, "mode": "full"}] * 2


def test_engines_that_differ_are_reported():
    cardboard = Cardboard()
    client = serve(cardboard)
    cardboard.options[1]["lambda"] = 0.2
    answer = client.get("/v1/cor")
    assert answer.status_code == 409
    assert "engine 1 routes otherwise" in answer.json()["error"]["message"]


def test_without_the_flag_nothing_changes():
    cardboard = Cardboard(admin=False)
    client = serve(cardboard)
    answer = client.post("/v1/cor", json={"lambda": 0.2})
    assert answer.status_code == 403
    assert "--cor-admin" in answer.json()["error"]["message"]
    assert cardboard.changes == 0
    assert client.get("/v1/cor").status_code == 200


def test_other_servers_have_no_such_path():
    app = FastAPI()
    app.state.args = SimpleNamespace(additional_config=None)
    CorEndpoint().attach_router(app)
    assert TestClient(app).get("/v1/cor").status_code == 404
    render = FastAPI()  # a front end without an engine
    render.include_router(build_router())
    assert TestClient(render).get("/v1/cor").status_code == 503


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "json"])
def test_the_content_type_is_asked_for(kind):
    headers = {"content-type": kind} if kind else {}
    answer = serve(Cardboard()).post("/v1/cor", content=b'{"lambda": 0.2}', headers=headers)
    assert answer.status_code == 415


def malformed() -> list[bytes]:
    """1,000 bodies that are no change: by hand, and by damage to a valid one."""
    bodies = [
        b"", b" ", b"null", b"0.1", b"[]", b'"off"', b"true", b"{}", b"{", b'{"lambda"', b'{"lambda":}',
        b'{"lambda": 0.1', b'{"lambda": 0.1,}', b"{'lambda': 0.1}", b'{"lambda": "0.1"}', b'{"lambda": true}',
        b'{"lambda": null}', b'{"mode": null}', b'{"lambda": null, "mode": "off"}', b'{"lambda": [0.1]}',
        b'{"lambda": {"x": 1}}', b'{"lambda": -0.1}', b'{"lambda": -1e-320}', b'{"lambda": NaN}',
        b'{"lambda": Infinity}', b'{"lambda": -Infinity}', b'{"lambda": 1e999}',
        b'{"lambda": 1' + b"0" * 400 + b"}",
        b'{"lambda": 0x10}', b'{"lambda_": 0.1}', b'{"Lambda": 0.1}', '{"λ": 0.1}'.encode(),
        b'{"mode": "on"}',
        b'{"mode": ""}', b'{"mode": "OFF"}', b'{"mode": 1}', b'{"mode": ["off"]}', b'{"mode": "\\ud800"}',
        b'{"\\ud800": 1}', b'{"mode": "off\\u0000"}', b'{"a\\nb": 1}', b'{"lambda": 0.1, "mode": "off"}',
        b'{"lambda": 0.1, "mode": "layer"}', b'{"lambda": 0, "mode": "off"}',
        b'{"lambda": 0.1, "mode": "random"}',
        b'{"lambda": 0.1, "admin": true}', b'{"lambda": 0.1, "scores": "/etc/passwd"}', b'{"lambda": 0.1} x',
        b'{"lambda": 0.1}{"lambda": 0.2}', b"\xff\xfe", b'{"mode": "\xff"}', b'\xef\xbb\xbf{"lambda": 0.1}',
        b"[" * 4000, b'{"a":' * 800, b'{"lambda": 0.1}' + b" " * 5000, b'{"' + b"a" * 4000 + b'": 1}',
        b"\x00" * 100,
        b'{"lambda": 0.1, "k": [1, 2]}', b'{"__proto__": {"lambda": 0.1}}',
        b'{"lambda": 9' + b"9" * 4000 + b"}", b'{"router": null}', b'{"router": 1}', b'{"router": "off"}',
        b'{"router": "/etc/passwd"}', b'{"router": [false]}',
    ]  # fmt: skip
    generator = random.Random(0)
    valid = [b'{"lambda": 0.125}', b'{"mode": "off"}', b'{"lambda": 0.2, "mode": "full"}']
    while len(bodies) < 1000:
        body = bytearray(generator.choice(valid))
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(len(body))
            kind = generator.randrange(3)
            if kind == 0:
                body[at] = generator.randrange(256)
            elif kind == 1:
                del body[at]
            else:
                body.insert(at, generator.randrange(256))
        try:
            parsed = json.loads(bytes(body))
        except (ValueError, RecursionError):
            parsed = None
        still_valid = isinstance(parsed, dict) and set(parsed) <= {"lambda", "mode"}
        if not still_valid:
            bodies.append(bytes(body))
    return bodies


def test_a_thousand_malformed_bodies():
    cardboard = Cardboard()
    client = serve(cardboard)
    bodies = malformed()
    assert len(bodies) == 1000
    for body in bodies:
        answer = client.post("/v1/cor", content=body, headers=JSON)
        assert answer.status_code in (400, 413), (body, answer.status_code, answer.text)
        message = answer.json()["error"]["message"]
        assert message and "\n" not in message and len(message) < 500, (body, message)
        assert "Traceback" not in message and "cor_vllm" not in message
    assert cardboard.changes == 0
    assert client.post("/v1/cor", json={"lambda": 0.2}).status_code == 200


def test_counters_start_at_the_first_reading_and_add_up_over_engines():
    cardboard = Cardboard(observe=True)
    client = serve(cardboard)
    metrics, engines = client.app.state.cor_metrics, client.app.state.cor_engines

    def read() -> None:
        metrics.count(asyncio.run(engines.call("cor_counts")))

    cardboard.counts = [[100, 10, 5, 1], [0, 0, 0, 0]]  # warming up
    read()
    assert sample(client, "cor_slots_total", layer="1") == 0
    cardboard.counts = [[130, 14, 8, 2], [7, 1, 3, 1]]
    read()
    read()
    names = ("slots", "slots_changed", "distinct_experts", "router_steps")
    assert [sample(client, f"cor_{name}_total", layer="1") for name in names] == [37, 5, 6, 2]


def test_without_observe_there_are_no_device_counters():
    client = serve(Cardboard())
    assert sample(client, "cor_slots_total", layer="1") is None
    assert sample(client, "cor_hooked_layers", worker="3") == 1
    assert [sample(client, f"cor_{n}") for n in ("budget", "model_budget", "model_top_k")] == [6, 6, 3]
    assert sample(client, "cor_top_k", layer="1") == 2


def test_what_is_hardly_meant_is_said_in_the_answer_and_the_log(caplog):
    client = serve(Cardboard())
    assert client.get("/v1/cor").json()["warnings"] == []
    with caplog.at_level("WARNING", "vllm.cor"):
        answer = client.post("/v1/cor", json={"lambda": 1000}).json()
    assert answer["warnings"] == ["λ = 1000.0"]
    assert [record.getMessage() for record in caplog.records] == ["CoR: λ = 1000.0"]


def test_a_second_server_in_one_process_has_its_own_metrics():
    """vLLM unregisters its own metrics at each start; ours must not stand in the way of the next."""
    registry = CollectorRegistry()
    first = Cardboard(observe=True)
    Metrics(combine([first.cor_status(0)]), registry)
    second = Cardboard()
    second.fixed["sha256"] = "b" * 64
    second.options[0]["mode"] = "off"
    Metrics(combine([second.cor_status(0)]), registry)
    shown = {s.labels["scores_sha256"]: s.value for m in registry.collect() if m.name == "cor_info"
             for s in m.samples}  # fmt: skip
    assert shown == {"b" * 64: 1}
    assert registry.get_sample_value("cor_lambda", {"layer": "1"}) == 0
    assert registry.get_sample_value("cor_slots_total", {"layer": "1"}) is None


MULTIPROCESS = """
import sys
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from cor_vllm.live.metrics import Metrics
from cor_vllm.live.state import combine
from tests.unit.test_cor_endpoint import Cardboard

for sha256, layers in zip(sys.argv[1::2], sys.argv[2::2]):
    cardboard = Cardboard()
    cardboard.fixed["sha256"] = sha256
    status = cardboard.cor_status(0)[: int(layers)]
    status[0]["layers"] = status[0]["layers"][: int(layers)]
    Metrics(combine([status]))
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""

OTHER_VERSION = """
from prometheus_client import Gauge

Gauge("cor_info", "with labels of its own", ["age"], multiprocess_mode="mostrecent").labels("old").set(1)
"""


def test_a_folder_that_an_earlier_server_left_shows_the_routing_in_force(tmp_path):
    """PROMETHEUS_MULTIPROC_DIR of the user's own: three servers, the first two in one process."""

    def start(*arguments: str, program: str = MULTIPROCESS) -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("cor_")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def infos(shown: dict[str, float]) -> dict[str, float]:
        return {re.search(r'sha256="(.)', n)[1]: v for n, v in shown.items() if n.startswith("cor_info{f")}

    start(program=OTHER_VERSION)
    shown = start("a" * 64, "2", "b" * 64, "2")
    assert infos(shown) == {"a": 0, "b": 1}
    assert shown['cor_top_k{layer="3"}'] == 4 and shown['cor_hooked_layers{worker="1"}'] == 1
    shown = start("c" * 64, "1")
    assert infos(shown) == {"a": 0, "b": 0, "c": 1}
    assert shown['cor_top_k{layer="3"}'] == 0 and shown['cor_top_k{layer="1"}'] == 2
    assert shown['cor_hooked_layers{worker="1"}'] == 0 and shown["cor_budget"] == 2


def test_activations_count_every_token_that_is_computed_once():
    """Two prompts of 5 and 3 tokens, of which 2 come from the prefix cache; 4 tokens each are generated."""
    registry = CollectorRegistry()
    state = combine([Cardboard().cor_status(0)])
    activations = Activations(Metrics(state, registry), state.budget)

    def iteration(computed: int, generated: int, first: int) -> SimpleNamespace:
        return SimpleNamespace(
            prompt_token_stats=SimpleNamespace(computed=computed),
            num_generation_tokens=generated,
            time_to_first_tokens_iter=[0.1] * first,
        )

    activations.record(None, iteration(computed=6, generated=2, first=2))
    for _ in range(3):
        activations.record(None, iteration(computed=0, generated=2, first=0))
    activations.record(None, None)
    assert registry.get_sample_value("cor_expert_activations_total") == (6 + 3 * 2) * 6
