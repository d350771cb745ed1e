"""Servers as rows of an evaluation: a row is what its name says, or it is not measured."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cor_vllm import cli, overlay
from cor_vllm import scores as scores_file
from cor_vllm.evaluate import runs
from cor_vllm.evaluate.conditions import Permuted
from cor_vllm.overlay import RouterOverlay
from cor_vllm.scores import Scores
from cor_vllm.testing import make_overlay
from cor_vllm.testing.make_scores import make
from tests import fake_server
from tests.fake_server import Fake
from tests.unit.test_evaluate_faults import refused

MODEL = Path("examples/demo/model")
TASK = "examples/demo/tasks/demo_tail.yaml"


@pytest.fixture(scope="module")
def demo() -> Scores:
    return make(MODEL, k=[2, 3, 4, 4, 5, 6])


@pytest.fixture(scope="module")
def file(demo: Scores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    scores_file.save(path, demo)
    return path


@pytest.fixture(scope="module")
def trained() -> RouterOverlay:
    return make_overlay.make(MODEL)


@pytest.fixture(scope="module")
def router(trained: RouterOverlay, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("router") / "router.safetensors"
    overlay.save(path, trained)
    return path


@pytest.fixture
def server() -> Iterator[Fake]:
    with fake_server.running(Fake("demo", str(MODEL))) as fake:
        yield fake


def digest(path: Path) -> str:
    return scores_file.digest(path.read_bytes())


def evaluate(output: Path, *flags: str, tasks: str = TASK) -> int:
    command = ["evaluate", str(MODEL), "--output", str(output), "--tasks", tasks, "--limit", "3"]
    return cli.main([*command, *flags])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("full", None, "no counterfactual routing"),
        ("standard", {}, "the row stands for a server without"),
        ("standard-again", {"mode": "off"}, "the row stands for a server without"),
        ("full", {"mode": "layer"}, "the mode is layer, not full"),
        ("full", {"mode": "off"}, "the mode is off, not full"),
        ("full", {"lambda": 0.3}, "λ is 0.3, not 0.1"),
        ("full", {"swap_rate": 0.05}, "the swap rate is 0.05, not None"),
        ("full", {"weights": "fused"}, "what weighs the experts is fused, not router"),
        ("full-fused", {}, "what weighs the experts is router, not fused"),
        ("off", {"mode": "full"}, "the mode is full, not off"),
        ("random", {"mode": "random", "seed": 3}, "the seed is 3, not 0"),
        ("static-5", {"static_k": 6}, "static k is 6, not 5"),
        ("expert-lambda0.05", {"mode": "expert"}, "λ is 0.1, not 0.05"),
        ("full-permuted", {}, "it has another scores file than that row's"),
        ("static-99", {"static_k": 9}, "see --list-conditions"),
        ("gate-router", {}, "only transformers can do that row"),
        ("mine-permuted", {}, "a name of a row that a scores file defines"),
    ],
)
def test_a_server_that_is_not_what_its_row_is_called(
    name: str, options: dict[str, Any] | None, said: str, demo: Scores, file: Path, server: Fake,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if options is not None:
        server.cor = fake_server.state(demo, digest(file), **options)
    assert evaluate(tmp_path, "--cor-scores", str(file), "--server", f"{name}={server.url}") == 1
    assert said in refused(capsys)
    assert not list(tmp_path.glob("*.json")) and not server.prompts, "nothing was measured"


def test_another_scores_file_and_another_k_are_refused(
    demo: Scores, file: Path, server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cor = fake_server.state(demo, "0" * 64)
    flags = ["--cor-scores", str(file), "--server", f"full={server.url}"]
    assert evaluate(tmp_path, *flags) == 1
    assert f"the scores file is {'0' * 12}, not {digest(file)[:12]}" in refused(capsys)
    server.cor = fake_server.state(demo, digest(file))
    server.cor["layers"][2]["k"] = 5
    assert evaluate(tmp_path, *flags) == 1
    assert "k of layer 2 is 5, not 4" in refused(capsys)
    assert evaluate(tmp_path, *flags, "--cor-lambda", "0.2") == 1
    assert "λ is 0.1, not 0.2" in refused(capsys)


def test_a_server_of_the_rows_own_file_is_that_row(
    demo: Scores, file: Path, server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the file that the row stands for; a server that has it is accepted."""
    permuted = tmp_path / "full-permuted.safetensors"
    flags = ["--cor-scores", str(file), "--server", f"full-permuted={server.url}/v1/"]
    server.cor = fake_server.state(demo, digest(file))
    assert evaluate(tmp_path, *flags) == 1
    assert f"start it with --cor-scores {permuted}" in refused(capsys)
    server.cor = fake_server.state(Permuted(0)(demo), digest(permuted))
    assert evaluate(tmp_path, *flags) == 0
    run = runs.load(runs.path_of(tmp_path, "full-permuted"))
    assert run.description.startswith("full with CEI permuted; mode full, λ 0.1")
    assert run.settings["cor"] == server.cor
    assert run.control_of == "full" and run.settings["options"] is None


def test_names_that_the_table_does_not_know_are_described_by_the_server(
    demo: Scores, file: Path, server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cor = fake_server.state(demo, digest(file), mode="expert", admin=True)
    with fake_server.running(Fake("demo", str(MODEL))) as stock:
        rows = ["--server", f"mine={server.url}", "--server", f"standard={stock.url}"]
        assert evaluate(tmp_path, *rows) == 0
    captured = capsys.readouterr()
    description = f"server mine: mode expert, λ 0.1, Σ k_l 24, scores {digest(file)[:12]}, admin"
    assert f"| mine | {description} |" in captured.out and f"mine: {description}" in captured.err
    assert "no counterfactual routing |" in captured.out
    assert server.prompts == stock.prompts


def test_without_a_scores_file_a_known_name_still_says_its_mode(
    demo: Scores, file: Path, server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cor = fake_server.state(demo, digest(file), mode="layer")
    assert evaluate(tmp_path, "--server", f"full={server.url}") == 1
    assert "the mode is layer, not full" in refused(capsys)
    assert evaluate(tmp_path, "--server", f"static-5={server.url}") == 1
    assert "give --cor-scores FILE" in refused(capsys)
    server.cor = fake_server.state(demo, digest(file), **{"lambda": 0.3})
    assert evaluate(tmp_path, "--server", f"full={server.url}") == 0
    assert "λ 0.3" in capsys.readouterr().out


def test_a_server_that_changes_while_it_is_measured(
    demo: Scores, file: Path, server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cor = fake_server.state(demo, digest(file), admin=True)
    answer = server.answer

    def changing(path: str, body: Any) -> tuple[int, Any]:
        if len(server.prompts) > 6:  # after the canary
            server.cor = fake_server.state(demo, digest(file), admin=True, mode="off")
        return answer(path, body)

    server.answer = changing  # type: ignore[method-assign]
    flags = ["--cor-scores", str(file), "--server", f"full={server.url}"]
    assert evaluate(tmp_path, *flags) == 1
    line = refused(capsys)
    assert "changed while it was measured: before, demo, mode full" in line and "now demo, mode off" in line
    assert not list(tmp_path.glob("*.json")) and not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("served", "root", "accepted"),
    [
        ("model", "/elsewhere/model", True),  # the same last part
        ("demo", str(MODEL.resolve()), True),
        ("demo", "examples/demo", False),  # a folder here, and another one
        ("OTHER", "org/other", False),
    ],
)
def test_a_server_of_another_model_is_refused(
    served: str, root: str, accepted: bool, server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.models["data"][0].update(id=served, root=root)
    flags = ["--server", f"standard={server.url}"]
    assert evaluate(tmp_path, *flags) == (0 if accepted else 1)
    if not accepted:
        assert f"serves '{served}', started as '{root}', not {MODEL}" in refused(capsys)
        assert evaluate(tmp_path, *flags, "--served-name", served) == 0, "the user says that it is the same"
        capsys.readouterr()
        server.tokens = [1, 2, 3]
        assert evaluate(tmp_path / "b", *flags, "--served-name", served) == 1
        assert "has another tokenizer" in refused(capsys)


def test_faults_of_servers_are_one_line(
    server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--server", f"standard={server.url}"]

    def says(text: str, *more: str) -> None:
        assert evaluate(tmp_path, *flags, *more) == 1
        assert text in refused(capsys)

    says("has no model 'other' (--served-name), but demo", "--served-name", "other")
    for cor in ({"mode": "full"}, [], "html"):
        server.cor = cor  # type: ignore[assignment]
        says("GET /v1/cor answers what this version of cor-vllm cannot read")
    server.cor = None
    for status, text in ((409, "/v1/cor: 409"), (503, "/v1/cor: 503")):
        server.status = {"/v1/cor": status}
        says(text)
    server.status = {}
    server.models = {"data": []}
    says("does not say which models it has")
    server.models = Fake("demo", str(MODEL)).models
    server.key = "secret"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    says("set OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.status = {"/v1/completions": 400}
    says("/v1/completions was made to fail")
    server.status = {}
    assert evaluate(tmp_path, *flags) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--server", "full=ftp://h/"], "not an address"),
        (["--server", "full=localhost:8000"], "not an address"),
        (["--server", "full=http://[::1"], "not an address"),
        (["--server", "full=http://localhost:80000/v1"], "not an address"),
        (["--server", "../full=http://h"], "a row's name is also a file's"),
        (["--server", "a|b=http://h"], "a row's name is also a file's"),
        (["--server", "a=http://h", "--server", "a=http://i"], "--server a=…: is there twice"),
        (["--server", "a=http://h", "--server", "b=http://H/v1"], "the server of the row 'a', too"),
        (["--server", "full=http://127.0.0.1:9"], "is the server up"),
        (["--server", "a=http://h", "--backend", "vllm"], "--backend: means nothing with --server"),
        (["--server", "a=http://h", "--conditions", "full"], "--conditions: means nothing with --server"),
        (["--served-name", "a"], "--served-name: is of --server"),
    ],
)
def test_addresses_and_names(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tmp_path, *flags) == 1
    assert said in refused(capsys)


def test_the_same_server_may_be_measured_twice_for_its_noise(server: Fake, tmp_path: Path) -> None:
    rows = [f"--server=standard={server.url}", f"--server=standard-again={server.url}"]
    assert evaluate(tmp_path, *rows) == 0


@pytest.mark.parametrize(
    ("name", "what", "said"),
    [
        ("router", None, "the row stands for another router, which the server has not"),
        ("router", "off", "the router is the model's own, not"),
        ("router", "other", "the router is "),
        ("router", "scores", "the row stands for a router alone, and the server has scores"),
        ("standard", "on", "the row stands for a server without the plugin's routing"),
        ("full", "on", "the router is"),
        ("full", "scores", "not the model's own"),
        ("router-random-1", "on", "it does not have that row's router"),
        ("router-random-99", "on", "see --list-conditions"),
        ("static-5", "on", "give --cor-scores FILE, which defines it"),
    ],
)
def test_a_server_with_another_router_than_its_rows(
    name: str, what: str | None, said: str, demo: Scores, trained: RouterOverlay, router: Path,
    server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if what is not None:
        theirs = make_overlay.make(MODEL, seed=1) if what == "other" else trained
        scores = demo if what == "scores" else None
        server.cor = fake_server.state(scores, "0" * 64, theirs, on=what != "off")
    assert evaluate(tmp_path, "--cor-router", str(router), "--server", f"{name}={server.url}") == 1
    assert said in refused(capsys)
    assert not list(tmp_path.glob("*.json")) and not server.prompts, "nothing was measured"


def test_a_server_of_the_rows_own_router_is_that_row(
    trained: RouterOverlay, router: Path, server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the file of the random router that the row stands for."""
    server.cor = fake_server.state(None, None, trained)
    flags = ["--cor-router", str(router), "--server"]
    assert evaluate(tmp_path, *flags, f"router={server.url}") == 0
    run = runs.load(runs.path_of(tmp_path, "router"))
    assert run.description == (
        f"the router of --cor-router; router {trained.fingerprint[:12]} in layer {trained.layer}"
    )
    assert run.settings["cor"] == server.cor and "router" not in run.settings
    capsys.readouterr()
    assert evaluate(tmp_path, *flags, f"router-random-1={server.url}") == 1
    file = tmp_path / "router-random-1.safetensors"
    assert f"start it with --cor-router {file}" in refused(capsys)
    server.cor = fake_server.state(None, None, overlay.load(file))
    assert evaluate(tmp_path, *flags, f"router-random-1={server.url}") == 0
    assert runs.load(runs.path_of(tmp_path, "router-random-1")).control_of == "router"


def test_rows_of_scores_and_the_router_that_they_were_measured_with(
    demo: Scores, file: Path, trained: RouterOverlay, router: Path, server: Fake, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = demo.config.model.model_copy(update={"router_overlay": trained.fingerprint})
    under = dataclasses.replace(demo, config=demo.config.model_copy(update={"model": model}))
    scores_file.save(tmp_path / "under.safetensors", under)
    flags = ["--cor-router", str(router), "--server", f"full={server.url}", "--cor-scores"]
    sha256 = digest(tmp_path / "under.safetensors")
    server.cor = fake_server.state(under, sha256)
    assert evaluate(tmp_path / "o", *flags, str(tmp_path / "under.safetensors")) == 1
    assert f"the router is the model's own, not {trained.fingerprint[:12]}" in refused(capsys)
    server.cor = fake_server.state(under, sha256, trained)
    assert evaluate(tmp_path / "o", *flags, str(tmp_path / "under.safetensors")) == 0
    capsys.readouterr()
    server.cor = fake_server.state(demo, digest(file), trained)
    assert evaluate(tmp_path / "p", *flags, str(file)) == 1
    assert f"the router is {trained.fingerprint[:12]}, not the model's own" in refused(capsys)
    server.cor = fake_server.state(demo, digest(file), trained, on=False)
    assert evaluate(tmp_path / "p", *flags, str(file)) == 0
    assert "in layer 5, off" in capsys.readouterr().out


def test_a_router_without_its_file_is_described(
    trained: RouterOverlay, server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.cor = fake_server.state(None, None, trained)
    assert evaluate(tmp_path, "--server", f"router={server.url}") == 1
    assert "a name of a row that a router file defines; give --cor-router FILE" in refused(capsys)
    assert evaluate(tmp_path, "--server", f"mine={server.url}") == 0
    assert f"server mine: router {trained.fingerprint[:12]} in layer 5 |" in capsys.readouterr().out
