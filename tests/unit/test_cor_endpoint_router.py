"""GET and POST /v1/cor of servers with a router file, against the engines of cardboard."""

from tests.unit.test_cor_endpoint import Cardboard, sample, serve


def test_the_router_of_a_file_is_shown_and_switched_on_every_engine(caplog):
    cardboard = Cardboard(router=True)
    client = serve(cardboard)
    shown = client.get("/v1/cor").json()["router"]
    assert shown == {
        "sha256": "c" * 64, "fingerprint": "d" * 64, "layer": 3, "on": True, "drift": 0.25,
        "objective": "epo", "warnings": ["it harms"],
    }  # fmt: skip
    labels = {"layer": "3", "router_sha256": "c" * 64}
    assert sample(client, "cor_router_on", **labels) == 1
    with caplog.at_level("INFO", "vllm.cor"):
        answer = client.post("/v1/cor", json={"router": False}).json()
    assert answer["router"] == {**shown, "on": False} and answer["mode"] == "full"
    assert cardboard.routers == [False, False]
    assert sample(client, "cor_router_on", **labels) == 0
    assert [record.getMessage() for record in caplog.records if record.name == "vllm.cor"] == [
        "CoR: mode full, λ 0.1, router of the file on → mode full, λ 0.1, router of the file off",
        "CoR: it harms",
    ]
    assert client.post("/v1/cor", json={"router": True, "lambda": 0.15}).json()["lambda"] == 0.15
    assert client.get("/v1/cor").json()["router"]["on"]


def test_without_a_scores_file_what_depends_on_one_is_null():
    client = serve(Cardboard(router=True, scores=False))
    answer = client.get("/v1/cor").json()
    null = ("scores_sha256", "mode", "lambda", "swap_rate", "static_k", "weights", "seed", "model_top_k",
            "budget", "model_budget")  # fmt: skip
    assert {name: answer[name] for name in null} == dict.fromkeys(null)
    assert (answer["layers"], answer["router"]["on"], answer["fingerprint"]) == ([], True, "f" * 64)
    assert [w["hooked_layers"] for w in answer["workers"]] == [0] * 4
    assert sample(client, "cor_router_on", layer="3", router_sha256="c" * 64) == 1
    assert sample(client, "cor_budget") is None and sample(client, "cor_model_top_k") is None
    info = {"mode": "", "weights": "", "scores_sha256": "", "fingerprint": "f" * 64, "version": "1"}
    assert sample(client, "cor_info", **info) == 1


def test_a_server_without_a_router_file_has_nothing_to_switch():
    cardboard = Cardboard()
    client = serve(cardboard)
    assert client.get("/v1/cor").json()["router"] is None
    answer = client.post("/v1/cor", json={"router": False})
    assert answer.status_code == 409 and "no router file" in answer.json()["error"]["message"]
    assert cardboard.changes == 0
    assert sample(client, "cor_router_on", layer="3", router_sha256="c" * 64) is None


def test_engines_whose_routers_differ_are_reported():
    cardboard = Cardboard(router=True)
    client = serve(cardboard)
    cardboard.routers[1] = False
    assert "engine 1 routes otherwise" in client.get("/v1/cor").json()["error"]["message"]
