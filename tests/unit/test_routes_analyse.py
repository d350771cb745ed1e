"""A whole route analysis on a tiny model: its files, its report, resuming, and its faults."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.interventions.state import partial_path
from cor_vllm.calibrate.routes import measure, pipeline
from cor_vllm.calibrate.routes.closed_form import last_layer_utilities
from cor_vllm.calibrate.routes.groups import BINS
from cor_vllm.calibrate.routes.options import AnalysisOptions
from cor_vllm.calibrate.routes.pipeline import analyse
from cor_vllm.calibrate.routes.report import findings, print_analysis
from cor_vllm.calibrate.routes.tables import FILE, Analysis, read_analysis
from cor_vllm.cli import main
from cor_vllm.testing import tiny_models

QUIET = Console(quiet=True)
SHARPER = 10  # times the logits, so that confident, ambiguous and fragile tokens are all there


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_models.build("qwen3_moe", tmp_path_factory.mktemp("model") / "tiny")
    return changed(folder, "lm_head.weight", lambda weight: weight * SHARPER)


def changed(folder: Path, ending: str, change: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(ending):
            tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 documents of 12 characters."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (25, 12), generator=generator).tolist()
    file = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    file.write_text("\n".join(json.dumps(bytes(row).decode()) for row in letters))
    return file


def options(model: Path, output: Path, corpus: Path, **values: Any) -> AnalysisOptions:
    small = {"routes": 8, "num_tokens": 250, "corpus": str(corpus)}
    return AnalysisOptions(model=str(model), output=output, **(small | values))


@pytest.fixture(scope="module")
def result(checkpoint: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("result") / "analysis"
    analyse(options(checkpoint, output, corpus, rows=output.parent / "rows.jsonl"), QUIET)
    return output


def test_a_finished_folder_holds_the_result_and_its_pictures(result: Path, corpus: Path) -> None:
    assert {path.name for path in result.iterdir()} == {
        FILE, "regret.png", "regret.svg", "saturation.png", "saturation.svg"
    }  # fmt: skip
    raw = json.loads((result / FILE).read_text())
    assert raw["format"] == "cor-misrouted/1"
    assert raw["options"]["corpus"] == corpus.name and "output" not in raw["options"]
    assert (raw["text"]["scored"], raw["text"]["documents"]) == (250, 23)
    assert set(raw["versions"]) == {"cor-vllm", "torch", "transformers"}
    assert [group["name"] for group in raw["layers"][0]["groups"]][:4] == [*BINS, "all"]


def test_the_result_is_read_back_as_it_was_written(result: Path) -> None:
    found = read_analysis(result)
    assert read_analysis(result / FILE) == found
    assert Analysis.model_validate_json(found.model_dump_json()) == found


def test_the_rows_are_what_the_tables_are_means_of(result: Path) -> None:
    rows = [json.loads(line) for line in (result.parent / "rows.jsonl").read_text().splitlines()]
    table = read_analysis(result).layers[0]
    [every] = [group for group in table.groups if group.name == "all"]
    for side, null in (("realised", False), ("null", True)):
        own = [row["regret"] for row in rows if row["null"] == null]
        assert len(own) == 250
        assert getattr(every.measures["regret"], side) == pytest.approx(sum(own) / 250)


def test_the_report_says_what_the_excess_means(result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(result)]) == 0
    printed = capsys.readouterr().out
    assert "fragile" in printed and "as it must be" in printed
    assert findings(read_analysis(result))[0].split(": ")[1][:9] in printed


@pytest.mark.parametrize(
    ("excess", "p", "words"),
    [
        (0.1, 0.001, "on confident and ambiguous and fragile tokens other routes would have served the text"),
        (-0.1, 0.001, "gains less than it does by luck of the draw"),
        (0.1, 0.2, "no excess beyond its noise"),
        (None, None, "n/a, too few documents"),
    ],
)
def test_each_verdict_has_its_sentence(
    result: Path, excess: float | None, p: float | None, words: str
) -> None:
    analysis = read_analysis(result)
    interval = None if excess is None else (excess - 0.01, excess + 0.01)
    groups = []
    for group in analysis.layers[0].groups:
        update = {"excess": excess, "excess_interval": interval, "p_holm": p}
        regret = group.measures["regret"].model_copy(update=update)
        groups.append(group.model_copy(update={"measures": group.measures | {"regret": regret}}))
    layers = [analysis.layers[0].model_copy(update={"groups": groups, "layer": n}) for n in (2, None)]
    [found] = findings(analysis.model_copy(update={"layers": layers}))
    assert words in found and found.startswith("layer 2, all layers jointly: ")


def test_an_interrupted_run_goes_on_to_the_same_result(
    checkpoint: Path, corpus: Path, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = options(checkpoint, tmp_path / "again", corpus)

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "layer_table", interrupted)
        with pytest.raises(KeyboardInterrupt):
            analyse(wanted, QUIET)
    assert partial_path(tmp_path / "again" / FILE).exists() and not (tmp_path / "again" / FILE).exists()
    with monkeypatch.context() as patch:
        patch.setattr(measure, "last_layer_utilities", lambda *args: pytest.fail("measured again"))
        analyse(wanted, QUIET)
    for path in result.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    assert not partial_path(tmp_path / "again" / FILE).exists()


def test_layers_by_the_closed_form_and_by_replay_and_jointly(
    checkpoint: Path, corpus: Path, result: Path, tmp_path: Path
) -> None:
    """The final layer is the same as alone; replayed, it would be the same up to rounding."""
    found = analyse(options(checkpoint, tmp_path / "all", corpus, layers="all", joint=True), QUIET)
    assert [layer.layer for layer in found.layers] == [0, 1, 2, None]
    without_p = [group.model_dump(exclude={"measures"}) for group in found.layers[2].groups]
    assert without_p == [
        group.model_dump(exclude={"measures"}) for group in read_analysis(result).layers[0].groups
    ]
    assert found.layers[0].experts is not None and found.layers[3].experts is None
    assert (tmp_path / "all" / "layers.png").exists()
    some = analyse(options(checkpoint, tmp_path / "some", corpus, layers="1"), QUIET)
    assert [layer.layer for layer in some.layers] == [1]
    pair = zip(some.layers[0].groups, found.layers[1].groups, strict=True)
    for one, other in pair:
        assert one.measures["regret"].realised == pytest.approx(other.measures["regret"].realised, abs=1e-5)


@pytest.mark.parametrize("interrupted_at", [1, 3])
def test_an_interrupted_replay_goes_on_to_the_same_result(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at: int
) -> None:
    names, values = ("whole", "broken"), {"layers": "0,2", "num_tokens": 60}
    whole, broken = (options(checkpoint, tmp_path / name, corpus, **values) for name in names)
    analyse(whole, QUIET)
    step = measure.RouteMeasurement.step

    def interrupted(self: measure.RouteMeasurement, index: int) -> None:
        if index == interrupted_at:
            raise KeyboardInterrupt
        step(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(measure.RouteMeasurement, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            analyse(broken, QUIET)
    done = []
    with monkeypatch.context() as patch:
        patch.setattr(measure.RouteMeasurement, "step", lambda self, i: (done.append(i), step(self, i)))
        analyse(broken, QUIET)
    assert done[0] == interrupted_at
    assert (tmp_path / "whole" / FILE).read_bytes() == (tmp_path / "broken" / FILE).read_bytes()


def test_quotas_choose_the_tokens(checkpoint: Path, corpus: Path, result: Path, tmp_path: Path) -> None:
    found = analyse(options(checkpoint, tmp_path / "o", corpus, max_tokens=30, layers="1,2"), QUIET)
    groups = found.layers[1].groups
    assert [group.name for group in groups] == list(BINS), "a mean over all would be of no known text"
    whole = read_analysis(result).layers[0].groups[:3]
    assert found.text.scored <= 30
    for group, before in zip(groups, whole, strict=True):
        assert group.tokens == (min(5, before.tokens[0]), min(5, before.tokens[1]))
        assert group.share == before.share, "shares are of all tokens"


def test_the_json_goes_to_stdout_alone(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["analyse", str(checkpoint), "--output", str(tmp_path / "o"), "--corpus", str(corpus)]
    assert main([*command, "--num-tokens", "40", "--routes", "3", "--json"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads((tmp_path / "o" / FILE).read_text())


def test_a_single_route_has_no_regret_and_says_why(corpus: Path, tmp_path: Path) -> None:
    checkpoint = tiny_models.build("qwen3_moe", tmp_path / "tiny", num_experts_per_tok=7)
    found = analyse(options(checkpoint, tmp_path / "o", corpus, num_tokens=60), QUIET)
    assert any("every regret is 0" in note for note in found.notes)
    regret = found.layers[0].groups[2].measures["regret"]
    assert (regret.realised, regret.null, regret.excess) == (0, 0, 0)
    print_analysis(found, QUIET)


def test_one_document_and_empty_groups_are_not_available(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "one.txt"
    file.write_text("ab")
    command = ["analyse", str(checkpoint), "--output", str(tmp_path / "o"), "--corpus", str(file)]
    assert main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("n/a", "too few", "Documents: 1, too few", "Positions read: 1, all that"):
        assert words in printed


def test_a_pool_larger_than_the_experts_is_all_of_them(
    checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    small, large = (
        analyse(options(checkpoint, tmp_path / str(pool), corpus, num_tokens=30, pool=pool), QUIET)
        for pool in (7, 1000)
    )
    assert small.layers == large.layers
    assert any("drawn from 7 experts" in note for note in large.notes)


@pytest.mark.parametrize(
    ("ending", "change", "why"),
    [
        ("lm_head.weight", lambda w: w.index_fill(0, torch.tensor([5]), torch.nan), "losses are not finite"),
        ("layers.1.self_attn.o_proj.weight", lambda w: w * torch.nan, "router logits are not finite"),
        ("layers.1.mlp.gate.weight", lambda w: w * 0, "choose the same experts for every token"),
    ],
)
def test_models_that_mean_nothing_are_refused(
    corpus: Path, tmp_path: Path, ending: str, change: Any, why: str
) -> None:
    checkpoint = changed(tiny_models.build("qwen3_moe", tmp_path / "tiny"), ending, change)
    with pytest.raises(CalibrationError, match=why):
        analyse(options(checkpoint, tmp_path / "o", corpus, num_tokens=40), QUIET)


def test_utilities_that_are_not_finite_are_refused(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        found = last_layer_utilities(*args)
        return replace(found, utility=found.utility.clone().index_fill(1, torch.tensor([2]), torch.nan))

    monkeypatch.setattr(measure, "last_layer_utilities", broken)
    with pytest.raises(CalibrationError, match="routes at decoder layer 2 gave log-probabilities"):
        analyse(options(checkpoint, tmp_path / "o", corpus, num_tokens=40), QUIET)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--layers", "7"], "decoder layer 7 of this model cannot be analysed"),
        (["--layers", "x"], "--layers: "),
        (["--bins", "0.5,0.9"], "the higher one first"),
        (["--max-tokens", "3"], "give at least 6"),
        (["--routes", "0"], "--routes: "),
        (["--temperature", "0"], "--temperature: "),
        (["--trajectories", "t", "--answers", "a"], "give one"),
        (["--corpus", "missing.txt"], "cannot be read"),
        (["--seq-len", "600", "--token-ids", "IDS"], "reads at most 512"),
        (["--rows", "missing/rows"], "there is no folder missing"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, flags: list[str], why: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(pipeline, "load_model", lambda *args: pytest.fail("the model was loaded"))
    (tmp_path / "ids.json").write_text(json.dumps([[1] * 600]))
    flags = [str(tmp_path / "ids.json") if flag == "IDS" else flag for flag in flags]
    assert main(["analyse", str(checkpoint), "--output", str(tmp_path / "o"), *flags]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and why in error


def test_what_is_not_an_analysis_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"format": "cor-misrouted/9"}')
    with pytest.raises(CalibrationError, match="not an analysis that can be read"):
        read_analysis(tmp_path)
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_analysis(tmp_path / "no.json")


def test_every_measure_is_in_the_method(result: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "method.md").read_text(encoding="utf-8")
    assert not {
        name for name in read_analysis(result).layers[0].groups[0].measures if f"`{name}`" not in page
    }
