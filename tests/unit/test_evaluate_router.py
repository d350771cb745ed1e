"""The router of a router file as a condition: its rows, what they do to a model, and what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cor_vllm import cli, overlay
from cor_vllm import scores as scores_file
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.evaluate import engines, pipeline, runs
from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.evaluate.completion import new_run
from cor_vllm.evaluate.conditions import Condition, Rerouted, select
from cor_vllm.evaluate.options import EvaluateOptions, available, read_overlay, read_sources
from cor_vllm.evaluate.overlays import router_of
from cor_vllm.evaluate.routing import replaced_router
from cor_vllm.overlay import RouterOverlay
from cor_vllm.scores import Scores
from cor_vllm.testing import make_overlay, make_scores
from cor_vllm.testing.tiny_models import create
from tests import model_copies
from tests.unit.test_evaluate_faults import refused

MODEL = Path("examples/demo/model")
TASK = "examples/demo/tasks/demo_tail.yaml"
GATE = "model.layers.5.mlp.gate.weight"
QUICK = ["standard", "standard-again"]
ROUTER = ["router", "router-random-0", "router-random-1", "router-random-2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """r: a router; other: another; own: scores of the model's own router; under: those measured with r."""
    folder = tmp_path_factory.mktemp("files")
    trained = make_overlay.make(MODEL)
    overlay.save(folder / "r.safetensors", trained)
    overlay.save(folder / "other.safetensors", make_overlay.make(MODEL, seed=1))
    own = make_scores.make(MODEL)
    scores_file.save(folder / "own.safetensors", own)
    scores_file.save(folder / "under.safetensors", under(own, trained))
    return folder


def under(scores: Scores, trained: RouterOverlay) -> Scores:
    """The scores as if they had been measured with the router of an overlay."""
    model = scores.config.model.model_copy(update={"router_overlay": trained.fingerprint})
    return dataclasses.replace(scores, config=scores.config.model_copy(update={"model": model}))


def options(files: Path, output: Path, router: str | None = "r", **more: Any) -> EvaluateOptions:
    return EvaluateOptions.of(
        model=str(MODEL), output=output,
        router=None if router is None else files / f"{router}.safetensors", **more,
    )  # fmt: skip


def rows(given: EvaluateOptions) -> dict[str, Condition]:
    return {row.name: row for row in available(given)}


def quick(given: EvaluateOptions) -> list[str]:
    return [row.name for row in select(available(given), ["quick"])]


def evaluate(output: Path, *flags: str, model: Path = MODEL) -> int:
    command = ["evaluate", str(model), "--output", str(output), "--tasks", TASK, "--limit", "3"]
    return cli.main([*command, *flags])


# ---- rows


def test_the_rows_of_a_router_file_alone(files: Path, tmp_path: Path) -> None:
    found = rows(options(files, tmp_path))
    assert list(found) == QUICK + ROUTER == quick(options(files, tmp_path))
    for name, row in found.items():
        is_random = name.startswith("router-random-")
        assert row.control_of == ("router" if is_random else None)
        assert row.draw_of == ("router-random" if is_random else None)
        assert row.options is None and (row.router is not None) == (name in ROUTER)
    assert len(rows(options(files, tmp_path, router_draws=1))) == 4


def test_rows_of_scores_run_with_the_router_that_they_were_measured_with(files: Path, tmp_path: Path) -> None:
    also = {"own": files / "own.safetensors"}
    found = rows(options(files, tmp_path, scores=files / "under.safetensors", also=also))
    assert quick(options(files, tmp_path, scores=files / "under.safetensors")) == [
        *QUICK, "expert", "full", "full-permuted", *ROUTER
    ]  # fmt: skip
    for name, row in found.items():
        if name in QUICK or name in ROUTER:
            continue
        measured = row.options is not None and row.source == ""
        assert row.router == (Rerouted() if measured else None), name
        which = "the router of --cor-router" if measured else "the model's own router"
        assert row.description.endswith(f"; with {which}")
    assert found["standard"].router is None and found["iti"].router is None
    plain = rows(options(files, tmp_path, None, scores=files / "own.safetensors"))
    assert not any(row.router for row in plain.values()) and "router" not in plain
    assert not any("router of" in row.description for row in plain.values())


def test_scores_of_another_router_are_refused(files: Path, tmp_path: Path) -> None:
    fingerprint = overlay.load(files / "r.safetensors").fingerprint[:12]
    for router, said in ((None, "none was given"), ("other", "that of --cor-router is ")):
        with pytest.raises(EvaluationError, match=rf"\(fingerprint {fingerprint}\), and {said}"):
            read_sources(options(files, tmp_path, router, scores=files / "under.safetensors"))
    more = {"also": {"u": files / "under.safetensors"}}
    with pytest.raises(EvaluationError, match="these scores were measured under"):
        read_sources(options(files, tmp_path, None, scores=files / "own.safetensors", **more))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give --cor-scores FILE; `cor-vllm evaluate` also takes --cor-router FILE"),
        (["--cor-router", "missing"], "missing: cannot be read"),
        (["--cor-router", "{r}", "--cor-lambda", "0.1"], "--cor-lambda: is of --cor-scores"),
        (["--cor-router", "{r}", "--also", "a={own}"], "--also: is of --cor-scores"),
        (["--cor-router", "{r}", "--router-draws", "0"], "--router-draws 0: "),
        (["--cor-router", "{r}", "--conditions", "full"], "--conditions full: unknown"),
    ],
)
def test_flags_that_mean_nothing(
    flags: list[str], said: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: files / f"{name}.safetensors" for name in ("r", "own")}
    assert evaluate(tmp_path, *(flag.format_map(paths) for flag in flags)) == 1
    assert said in refused(capsys)


def test_the_list_says_which_router_a_row_has(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--cor-router", str(files / "r.safetensors"), "--cor-scores", str(files / "under.safetensors")]
    assert evaluate(tmp_path, *flags, "--list-conditions") == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert said["router"] == "the router of --cor-router"
    assert said["full"].endswith("; with the router of --cor-router")
    assert said["dola"].endswith("; with the model's own router")


# ---- what is refused, and what is said


def test_a_router_of_another_model_is_refused_before_anything_is_measured(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_copies.copy(MODEL, tmp_path / "model", model_copies.other_routers)
    flags = ["--cor-router", str(files / "r.safetensors")]
    for backend in ("vllm", "transformers"):
        assert evaluate(tmp_path / "o", *flags, "--backend", backend, model=tmp_path / "model") == 1
        line = refused(capsys)
        assert "r.safetensors: fingerprint: the router file has " in line
        assert not list((tmp_path / "o").iterdir())


def test_a_file_whose_own_check_is_against_it_is_warned_of(files: Path, tmp_path: Path) -> None:
    given = options(files, tmp_path)
    assert pipeline._harm(given, available(given)) == []
    overlay.save(tmp_path / "none.safetensors", make_overlay.make(MODEL, objective="none"))
    given = options(tmp_path, tmp_path, "none")
    (line,) = pipeline._harm(given, available(given))
    assert line.startswith("--cor-router ") and "this router is the model's own" in line
    assert pipeline._harm(given, select(available(given), ["standard"])) == []


def test_the_plugin_must_not_be_switched_off(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COR_DISABLE", "1")
    assert evaluate(tmp_path, "--cor-router", str(files / "r.safetensors"), "--router-draws", "1") == 1
    assert "COR_DISABLE is set, under which router, router-random-0 would be" in refused(capsys)


# ---- results


def test_a_result_is_kept_for_this_router_alone(files: Path, tmp_path: Path) -> None:
    def key(router: str | None, name: str, **more: Any) -> runs.Run:
        given = options(files, tmp_path, router, **more)
        return new_run(given, rows(given)[name], "transformers", {})

    for name in ("router", "router-random-0"):
        first, second = key("r", name), key("other", name)
        assert first.settings["router"] == overlay.load(files / "r.safetensors").fingerprint
        assert first.key != second.key
        runs.save(tmp_path, first)
        with pytest.raises(EvaluationError, match="a result made with another router;"):
            runs.resumed(tmp_path, second)
    assert key("r", "router-random-0").key != key("r", "router-random-1").key
    scores = {"scores": files / "own.safetensors"}
    for name in ("standard", "full"):
        assert key("r", name, **scores).key == key(None, name, **scores).key, "the file changes nothing there"
    assert key("r", "full", scores=files / "under.safetensors").settings["router"]


def test_an_engine_gets_the_rows_files(files: Path, tmp_path: Path) -> None:
    given = options(files, tmp_path, scores=files / "under.safetensors")
    sources, trained = read_sources(given), read_overlay(given)
    assert trained is not None
    served = {name: engines._served(given, sources, row) for name, row in rows(given).items()}
    path = {"router": str(files / "r.safetensors")}
    assert served["standard"][0] is None and served["standard"][1].router is None
    assert served["router"][0] == path and served["router"][1].router == trained.fingerprint
    assert served["router"][1].options is None
    cor, claim = served["full"]
    assert cor == {**path, "scores": str(files / "under.safetensors"), "mode": "full", "lambda": 0.1}
    assert claim.router == trained.fingerprint and claim.sha256 is not None
    cor, claim = served["router-random-1"]
    assert cor == {"router": str(tmp_path / "router-random-1.safetensors")}
    written = overlay.load(tmp_path / "router-random-1.safetensors")
    assert claim.router == written.fingerprint != trained.fingerprint


def test_experts_per_token_are_known_without_scores(files: Path, tmp_path: Path) -> None:
    given = options(files, tmp_path)
    for row in available(given):
        assert engines._activations(row, {}, read_overlay(given)) == 24, "six layers of four"
    trained = make_overlay.make(MODEL)
    model = trained.config.model.model_copy(update={"routers": None})
    config = trained.config.model_copy(update={"model": model})
    bare = RouterOverlay(trained.layer_index, trained.router_weight, config)
    assert engines._activations(available(given)[0], {}, bare) is None


# ---- what the rows do


def test_random_routers_are_as_far_from_the_models_own(files: Path, tmp_path: Path) -> None:
    given = options(files, tmp_path)
    own = make_overlay.base_weight(MODEL, 5).float()
    found = {name: router_of(given, rows(given)[name]) for name in ROUTER}
    trained = found["router"]
    assert trained is not None and trained.layer == 5
    size = (trained.weight - own).norm().item()
    for name, random in found.items():
        assert random is not None and random.layer == 5
        assert (random.weight - own).norm().item() == pytest.approx(size, rel=0.01)
        assert random.config.drift == pytest.approx(trained.config.drift, rel=0.01), name
    assert len({random.fingerprint for random in found.values() if random}) == 4
    again = router_of(given, rows(given)["router-random-0"])
    assert again is not None and again.fingerprint == found["router-random-0"].fingerprint
    assert router_of(given, rows(given)["standard"]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_models_own_router_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    network = create("qwen3_moe").to(dtype)
    network.save_pretrained(tmp_path)
    model, trained = MoeModel(network), make_overlay.make(tmp_path, layer=1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(KeyError), replaced_router(model, trained):
        inside = network.state_dict()
        changed = [name for name, value in inside.items() if not torch.equal(value, before[name])]
        assert changed == ["model.layers.1.mlp.gate.weight"]
        assert torch.equal(inside[changed[0]], trained.weight.to(dtype))
        raise KeyError
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.fixture(scope="module")
def table(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a router file and scores that were measured with it."""
    output = tmp_path_factory.mktemp("table")
    flags = ["--cor-scores", str(files / "under.safetensors"), "--backend", "transformers"]
    router = ["--cor-router", str(files / "r.safetensors"), "--router-draws", "2"]
    assert evaluate(output, *flags, *router, "--conditions", "full,dola,router,router-random-*") == 0
    return output


def gold(folder: Path, condition: str) -> dict[str, float]:
    return runs.load(runs.path_of(folder, condition)).benchmarks["demo_tail"].items["gold"]


def model_with(trained: RouterOverlay | None, to: Path) -> Path:
    """The demo model with the router of an overlay."""
    assert trained is not None

    def change(weights: model_copies.Weights) -> None:
        assert GATE in weights
        weights[GATE] = trained.weight  # float32, as the model is loaded

    return model_copies.copy(MODEL, to, change)


def test_the_row_is_the_model_with_that_router(files: Path, table: Path, tmp_path: Path) -> None:
    """With the router alone, and with the routing of scores on top, held against a changed checkpoint."""
    given = options(files, table)
    flags = ["--backend", "transformers", "--cor-scores", str(files / "own.safetensors"), "--conditions"]
    for name, others in (("router", ["full"]), ("router-random-1", [])):
        model = model_with(router_of(given, rows(given)[name]), tmp_path / name)
        assert evaluate(tmp_path / f"{name}-out", *flags, ",".join(["standard", *others]), model=model) == 0
        for expected, row in [("standard", name), *zip(others, others, strict=True)]:
            assert gold(table, row) == pytest.approx(gold(tmp_path / f"{name}-out", expected), abs=1e-4), row
    assert gold(table, "router") != pytest.approx(gold(table, "standard"), abs=1e-2)
    assert gold(table, "router") != pytest.approx(gold(table, "router-random-1"), abs=1e-2)


def test_rows_without_it_are_the_model_itself(files: Path, table: Path, tmp_path: Path) -> None:
    """Next to a row with the router, which came before them."""
    flags = ["--backend", "transformers", "--cor-scores", str(files / "own.safetensors")]
    assert evaluate(tmp_path, *flags, "--conditions", "full,dola") == 0
    for row in ("standard", "dola"):
        assert gold(table, row) == gold(tmp_path, row), row
    assert gold(table, "full") != gold(tmp_path, "full")


def test_the_table_has_the_router_against_its_controls(table: Path) -> None:
    text = (table / "table.md").read_text()
    router = text.split("## Against random routers")[1].split("## What the rows are")[0]
    assert "| `router` |" in router and " of 2" in router
    assert "`router-random, mean of 2`" in text and "## Against permuted CEI" not in text
    assert runs.load(runs.path_of(table, "router")).activations == 24
