"""`cor-vllm evaluate` and `tune` on the demo model: three ways to the same numbers, the table, going on."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cor_vllm import overlay, scores
from cor_vllm.calibrate.model.loading import load_model, model_folder
from cor_vllm.cli import main
from cor_vllm.commands import lifetime
from cor_vllm.evaluate import acts, runs
from cor_vllm.evaluate.benchmarks import chosen, load_task
from cor_vllm.evaluate.conditions import Condition, Sources
from cor_vllm.evaluate.harness import measure, transformers_model
from cor_vllm.evaluate.interventions import Interventions
from cor_vllm.evaluate.iti import fit, iti
from cor_vllm.evaluate.runs import Run
from cor_vllm.testing import make_overlay
from cor_vllm.testing.make_scores import make
from cor_vllm.testing.server import serve
from tests.e2e.test_vllm_commands import of_processes

pytestmark = pytest.mark.slow
DEMO = Path("examples/demo")
MODEL = DEMO / "model"
TASK = str(DEMO / "tasks" / "demo_tail.yaml")
LIMIT = "12"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    scores.save(path, make(MODEL, k=[2, 3, 4, 4, 5, 6]))
    return path


def routed(folder: Path) -> list[str]:
    """--cor-router of a new file; `under.safetensors` next to it has scores measured with that router."""
    trained, own = make_overlay.make(MODEL), make(MODEL, k=[2, 3, 4, 4, 5, 6])
    overlay.save(folder / "router.safetensors", trained)
    model = own.config.model.model_copy(update={"router_overlay": trained.fingerprint})
    config = own.config.model_copy(update={"model": model})
    scores.save(folder / "under.safetensors", dataclasses.replace(own, config=config))
    return ["--cor-router", str(folder / "router.safetensors")]


def evaluate(file: Path, output: Path, *flags: str, tasks: str = TASK) -> int:
    command = ["evaluate", str(MODEL), "--cor-scores", str(file), "--output", str(output), "--tasks", tasks]
    return main([*command, "--limit", LIMIT, *flags])


@pytest.fixture(scope="module")
def transformers_runs(file, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("transformers")
    rows = "quick,static-5,gate-router,gate-output,dola,full-dola,random,full-fused"
    assert evaluate(file, output, "--backend", "transformers", "--conditions", rows) == 0
    return output


def read(folder: Path, condition: str) -> Run:
    return runs.load(runs.path_of(folder, condition))


def gold(run: Run) -> dict[str, float]:
    return run.benchmarks["demo_tail"].items["gold"]


def test_the_table_has_every_condition_and_its_noise(transformers_runs):
    table = (transformers_runs / "table.md").read_text()
    assert len(re.findall(r"\n\| `?full-dola`? \|", table)) == 2  # its three differences, legend
    assert gold(read(transformers_runs, "standard")) == gold(read(transformers_runs, "standard-again"))
    line = next(line for line in table.splitlines() if line.startswith("| `full-dola` |"))
    assert line.count(", corrected ") == 3  # accuracy, right answer, margin
    line = next(line for line in table.splitlines() if line.startswith("| `standard-again` |"))
    assert "+0.00 [+0.00, +0.00], p 1.000, *noise*" in line


def test_the_report_of_the_folder_is_the_table(transformers_runs, capsys):
    assert main(["report", str(transformers_runs)]) == 0
    table = (transformers_runs / "table.md").read_text()
    assert "## Against permuted CEI" in table and capsys.readouterr().out == table + "\n"


def test_every_condition_does_something_else(transformers_runs):
    found = {
        path.stem: tuple(gold(runs.load(path)).values())
        for path in transformers_runs.glob("*.json")
        if path.stem != "standard-again"
    }
    assert len(set(found.values())) == len(found) == 11
    full, static = read(transformers_runs, "full"), read(transformers_runs, "static-5")
    assert (full.activations, static.activations) == (24, 30)
    assert 0 < full.slots_changed < 1 and static.slots_changed == 0


def test_the_same_command_goes_on_and_other_options_are_refused(file, transformers_runs, capsys):
    before = {path.name: path.read_bytes() for path in transformers_runs.glob("*.json")}
    assert evaluate(file, transformers_runs, "--backend", "transformers", "--conditions", "quick") == 0
    assert "full: there already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in transformers_runs.glob("*.json")} == before
    other = ["--backend", "transformers", "--conditions", "full", "--cor-lambda", "0.2"]
    assert evaluate(file, transformers_runs, *other) == 1
    assert "full.json: a result made with another options" in capsys.readouterr().err


def test_a_benchmark_leaves_no_cache_in_the_model(tmp_path):
    folder, _ = model_folder(str(MODEL))
    lm = transformers_model(load_model(folder, "auto", None), AutoTokenizer.from_pretrained(folder), 16)
    (benchmark,) = chosen((TASK,))
    tasks = load_task(benchmark, None)
    kept, again = [measure(lm, benchmark, tasks, 2, 0, cache) for cache in (str(tmp_path / "a"), None)]
    assert lm.cache_hook.dbdict is None and list(tmp_path.iterdir())
    assert kept.items == again.items


def test_an_engine_and_a_server_give_the_same_likelihoods(file, tmp_path, capfd):
    """Of prompts so long that some are cut, which the three back ends of the harness do differently.

    The engine also has another router, with which its scores were measured.
    """
    engine = ["--max-model-len", "18", "--enforce-eager", "--dtype", "float32"]
    length = engine[:2]
    capfd.readouterr()
    router, under = routed(tmp_path), tmp_path / "under.safetensors"
    assert evaluate(under, tmp_path / "engine", "--conditions", "full", *router, *engine) == 0
    assert capfd.readouterr().out.strip() == (tmp_path / "engine" / "table.md").read_text().strip()
    here = [*length, "--backend", "transformers", "--conditions", "full"]
    assert evaluate(file, tmp_path / "transformers", *here) == 0
    assert evaluate(under, tmp_path / "routed", *here, *router) == 0
    flags = [*engine, "--cor-scores", str(file)]
    with serve(MODEL, *flags, log=tmp_path / "log", env=of_processes()) as url:
        assert evaluate(file, tmp_path / "server", "--server", f"full={url}") == 0
        for wrong in ("standard", "layer"):
            assert evaluate(file, tmp_path / "wrong", "--server", f"{wrong}={url}") == 1
            assert f"is not what the row {wrong!r} is called" in capfd.readouterr().err
        other = tmp_path / "other.safetensors"
        scores.save(other, make(MODEL, k=[2, 3, 4, 4, 5, 6], seed=1))
        assert evaluate(other, tmp_path / "wrong", "--server", f"full={url}") == 1
        assert "the scores file is" in capfd.readouterr().err
        again = [f"--server=again={url}", "--served-name", "other"]
        assert evaluate(file, tmp_path / "wrong", *again) == 1
        assert "has no model 'other'" in capfd.readouterr().err
    plain, with_router = (gold(read(tmp_path / folder, "full")) for folder in ("transformers", "routed"))
    assert plain != pytest.approx(with_router, abs=2e-2), "or this does not show which router it was"
    for folder, condition, other in (
        ("engine", "standard", "transformers"),
        ("engine", "full", "routed"),
        ("server", "full", "transformers"),
    ):
        mine, theirs = read(tmp_path / folder, condition), read(tmp_path / other, condition)
        assert gold(mine).keys() == gold(theirs).keys() and len(gold(mine)) == int(LIMIT)
        assert gold(mine) == pytest.approx(gold(theirs), abs=2e-3), (folder, condition)
        columns = [run.benchmarks["demo_tail"] for run in (mine, theirs)]
        assert columns[0].max_model_len == columns[1].max_model_len == 18
        assert 0 < len(columns[0].cut) < int(LIMIT) and columns[0].cut == columns[1].cut
    served = json.loads(runs.path_of(tmp_path / "server", "full").read_text())["settings"]["cor"]
    assert served is not None, "what GET /v1/cor said is part of the result"
    assert "nothing to compare with" in (tmp_path / "server" / "table.md").read_text()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="Linux tells who started whom")
def test_no_engine_outlives_the_command(file, tmp_path):
    command = [sys.executable, "-m", "cor_vllm.cli", "evaluate", str(MODEL), "--cor-scores", str(file)]
    flags = [
        "--output",
        str(tmp_path / "out"),
        "--tasks",
        TASK,
        "--conditions",
        "standard",
        "--dtype",
        "float32",
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, *flags], stdout=log, stderr=log, env=of_processes())
    tree: lifetime.Processes = {}
    try:
        # vLLM renames its processes: the engine core is a grandchild.
        while not any("EngineCore" in name for name in map(command_line, tree)):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
            tree = lifetime.tree([process.pid])
        time.sleep(3 * lifetime.POLL_SECONDS)
        tree |= lifetime.tree([process.pid])
        process.kill()
        process.wait(60)
        while lifetime._alive(tree):  # the test's own time limit ends this
            time.sleep(0.1)
    finally:
        lifetime.end(tree)


def command_line(pid: int) -> str:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_text(errors="replace")
    except OSError:
        return ""


def test_tune_reports_on_items_that_took_no_part(file, tmp_path, capsys):
    command = ["tune", str(MODEL), "--cor-scores", str(file), "--output", str(tmp_path), "--tasks", TASK]
    assert main([*command, "--limit", LIMIT, "--backend", "transformers", "--grid", "0.05"]) == 0
    text = capsys.readouterr().out
    assert "Chosen: **" in text and "| expert-lambda0.05 |" in text


def test_iti_shifts_an_item_by_what_other_questions_taught(file, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend("examples/smollm2")
    import mirror

    with (DEMO / "probes.jsonl").open() as lines:
        probes = [json.loads(line) for line in itertools.islice(lines, 24)]
    rows = []  # with TruthfulQA's fields, which ITI is fitted on
    for probe in probes:
        wrong = [choice for choice in probe["choices"] if choice != probe["answer"]]
        targets = {"choices": [probe["answer"], *wrong], "labels": [1] + [0] * len(wrong)}
        rows.append({"question": probe["question"], "mc1_targets": targets, "mc2_targets": targets})
    mirror.write(tmp_path / "truthfulqa/truthful_qa", {"multiple_choice": {"validation": rows}})
    folder, _ = model_folder(str(MODEL))
    model, tokenizer = load_model(folder, "float32", None), AutoTokenizer.from_pretrained(folder)
    lm = transformers_model(model, tokenizer, 16)
    interventions = Interventions(model, tokenizer, tmp_path, 0)
    (benchmark,) = chosen(("truthfulqa_mc1",))
    tasks = load_task(benchmark, tmp_path)
    with interventions.applied(Condition("iti", "ITI", act=acts.iti), Sources({"": scores.load(file)}), lm):
        found = measure(lm, benchmark, tasks, None, 0, None).items["gold"]
    assert lm.folds is None
    for fold in (0, 1):
        examples = [
            (tokenizer(f"Q: {row['question']} A: {answer}").input_ids, label, number)
            for number, row in enumerate(rows)
            for answer, label in zip(*row["mc2_targets"].values(), strict=True)
            if number % 2 != fold
        ]
        with iti(model.model, fit(model.model, examples)):
            expected = measure(lm, benchmark, tasks, None, 0, None).items["gold"]
        own = [item for item in found if int(item.rpartition("/")[2]) % 2 == fold]
        assert len(own) == 12
        assert [found[item] for item in own] == pytest.approx([expected[item] for item in own], abs=1e-3)
        others = found.keys() - set(own)
        assert any(abs(found[item] - expected[item]) > 0.1 for item in others), "or the folds say nothing"


def test_a_condition_that_a_server_cannot_do_is_refused(file, tmp_path, capsys):
    assert evaluate(file, tmp_path, "--conditions", "dola") == 1
    assert "only transformers can do them" in capsys.readouterr().err
