"""What `make gpu` runs, as far as a CPU can tell: programs, statistics, and that planted faults are found."""

import csv
import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import families, gpu, kernel, kernel_check, serving
from benchmarks.common import dummy_models, graphs, results, servers
from benchmarks.common.client import Figures
from benchmarks.common.ratios import Ratio, at_least, paired
from benchmarks.common.routing_cases import Case, Inputs, difference
from benchmarks.distinct import Recorder
from cor_vllm.kernels import reference


def noisy(level: float, rounds: int, seed: int) -> list[float]:
    """Figures of a machine whose speed drifts by 30 %, with 1 % of noise of their own."""
    own, drift = random.Random(seed), random.Random(0)
    return [level * drift.uniform(0.7, 1.3) * own.gauss(1, 0.01) for _ in range(rounds)]


def test_a_planted_slowdown_is_reported_and_noise_is_not() -> None:
    stock, slow, again = noisy(100, 8, 1), noisy(95, 8, 2), noisy(100, 8, 3)
    ratio, noise = paired(slow, stock), paired(again, stock)
    assert ratio.differs and ratio.low < 0.95 < ratio.high and at_least(ratio, 0.98) == "missed"
    assert not noise.differs and at_least(noise, 0.97) == "met"
    assert at_least(noise, 1.0) == "undecided", "noise proves no equality"
    assert at_least(paired([1.0], [1.0]), 0.5) == "undecided", "one round proves nothing"
    assert at_least(Ratio(0.97, 0.95, 0.99, 5), 0.98) == "undecided", "the interval decides, not the mean"
    with pytest.raises(ValueError, match="positive"):
        paired([0.0], [1.0])


def test_the_interval_is_student_s() -> None:
    """Logarithms 0 and 2, mean 1, standard deviation √2: 1 ± 12.71 · √2 / √2."""
    ratio = paired([1.0, torch.e**2], [1.0, 1.0])
    assert torch.tensor([ratio.mean, ratio.low, ratio.high]).log().tolist() == pytest.approx(
        [1, -11.71, 13.71]
    )


def test_rows_and_tables(tmp_path: Path) -> None:
    path = results.write_rows("t", [{"a": 1, "load_average": 9}, {"b": "x|"}], "here", tmp_path)
    with path.open() as file:
        first, second = csv.DictReader(file)
    assert (first["a"], first["b"], first["load_average"], first["device"]) == ("1", "", "9", "here")
    assert second["b"] == "x|" and second["date"] and second["torch"] and second["load_average"] != "9"
    assert results.markdown([{"a": 1.23456, "bb": None}]) == "| a     | bb |\n| ----- | -- |\n| 1.235 |    |"


FAULTS = {
    "other experts": lambda w, i: (w, i.where(i != i[0, 0], (set(range(16)) - set(i[0].tolist())).pop())),
    "an expert twice": lambda w, i: (w, i[:, :1].expand_as(i)),
    "ids from": lambda w, i: (w, i + 16),
    "weights off": lambda w, i: (w * 1.001, i),
    "padding rows": lambda w, i: (w, i.clamp_min(0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds_planted_faults(fault: str) -> None:
    case = Case(6, 16, 4, padding=fault == "padding rows")
    inputs = Inputs.of(case, "cpu", seed=2)
    right = reference.cor_topk(inputs.logits, inputs.bias, 4, True, is_padding=inputs.padding)
    assert difference(case, inputs, *right) == ""
    assert fault in difference(case, inputs, *FAULTS[fault](*right))


@pytest.mark.parametrize(("gap", "result"), [(1e-6, ""), (1e-4, "other experts in 1 rows")])
def test_ids_may_differ_only_within_float32(gap: float, result: str) -> None:
    probabilities = torch.tensor([0.5, 0.25 + gap / 2, 0.25 - gap / 2], dtype=torch.float64)
    case = Case(1, 3, 2, dtype=torch.float64, bias="none", renormalize=False)
    inputs = Inputs(probabilities.log()[None], None, None)
    ids = torch.tensor([[0, 2]])
    assert difference(case, inputs, probabilities[ids], ids) == result


def test_kernel_check_in_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernel_check", "--output", str(tmp_path)])
    assert kernel_check.main() == 0
    printed = capsys.readouterr().out
    assert "k = 1 … 16 in one captured graph" in printed and "aim: routing step right on cpu: met" in printed
    with (tmp_path / "checks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["kernel"] for row in rows} == {"passed", "needs a GPU"}
    assert sum(row["kernel"] == "needs a GPU" for row in rows) == 3, "not made is not passed"


def test_kernel_check_fails_where_the_kernel_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def biased(case: Case, inputs: Inputs) -> Any:
        return reference.cor_topk(inputs.logits, None, case.top_k, case.renormalize, case.scoring, case.scale)

    monkeypatch.setattr(kernel_check, "kernel", biased)
    monkeypatch.setattr(sys, "argv", ["kernel_check", "--output", str(tmp_path)])
    assert kernel_check.main() == 1


def test_contestants_alternate() -> None:
    seen: list[str] = []

    @dataclasses.dataclass
    class Fake:
        name: str

        def seconds(self) -> float:
            seen.append(self.name)
            return 1.0

    measured = graphs.alternate({name: Fake(name) for name in "abc"}, 2)
    assert "".join(seen) == "abccba" and measured == {name: [1.0, 1.0] for name in "abc"}


def test_kernel_aims() -> None:
    def rows(against: float, floors: float) -> list[dict[str, Any]]:
        shape = {"T": 16, "N": 128, "k": 8, "kernel / itself": paired([1.0, 1.0], [1.0, 1.0])}
        figures = {"kernel / vllm": against, "kernel / floor": floors}
        return [shape | {name: paired([f, f], [1.0, 1.0]) for name, f in figures.items()}]

    assert [": met (" in line for line in kernel.aims(rows(0.9, 1.2))] == [True, True]
    assert [": missed (" in line for line in kernel.aims(rows(1.1, 1.6))] == [True, True]
    assert all("not measured" in line for line in kernel.aims([{"T": 1}]))


def planted(slower: float) -> serving.Rounds:
    """Three rounds at one batch; the CoR server is `slower`, the machine drifts between rounds."""
    speeds = {"stock": 1.0, "full": 1 - slower, serving.AGAIN: 1.002}
    return {
        8: {
            name: [Figures(100 * s * drift, 5 / s, 2 / s) for drift in (1.0, 0.7, 1.2)]
            for name, s in speeds.items()
        }
    }


def test_serving_rows_and_aims() -> None:
    counted = {"full": {8: {"distinct": 9.5, "sum_k": 24}}}
    stock, full, again = serving.rows_of(planted(0.05), counted)
    assert full["tokens/s / stock"].mean == pytest.approx(0.95 / 1.001, rel=1e-6)
    assert full["TPOT / stock"].mean > 1.05 and (full["distinct experts"], full["Σ k_l"]) == (9.5, 24)
    assert again["tokens/s / stock"].mean == pytest.approx(1.002) and stock["tokens/s / stock"] == ""
    (line,) = serving.aims([stock, full, again], gpu=True)
    assert line.startswith("aim: full: tokens/s at least 0.97 of stock: missed (batch 8: 0.949")
    (line,) = serving.aims(serving.rows_of(planted(0.01), counted), gpu=True)
    assert ": met (" in line


def test_what_fits() -> None:
    assert serving.together(None, 78) == (6, 5)
    assert serving.together(None, 138) == (12, 5)
    assert serving.together(48, 138) == (48, 2)
    with pytest.raises(serving.ServerFailed, match="two servers of 48 layers take"):
        serving.together(48, 78)


def test_a_pair_at_a_time_has_stock_in_each(tmp_path: Path) -> None:
    setting = serving.on_gpu(tmp_path, 2, None, graphs_only=False)
    assert [list(part.cor) for part in serving.groups(setting, 2)] == [
        ["off"],
        ["expert"],
        ["full"],
        ["torch"],
    ]
    assert serving.groups(setting, 5) == [setting]
    names = {each.name: each for each in setting.contestants()}
    assert list(names) == ["stock", "off", "expert", "full", "torch"]
    assert names["stock"].env()["VLLM_PLUGINS"] == "" and "VLLM_PLUGINS" not in names["off"].env()
    assert "--additional-config" not in names["stock"].flags()
    assert "benchmarks.common.torch_router.TorchRouter" in names["torch"].flags()
    assert names["torch"].cor == names["full"].cor
    engine = servers.keywords(setting.flags)
    assert engine["load_format"] == "dummy" and engine["max_num_seqs"] == 256


@pytest.mark.parametrize("layers", [4, 6, 8, 12, 48])
def test_uneven_budgets_keep_the_sum(layers: int) -> None:
    k = dummy_models.uneven(layers, 8, 2, 16)
    assert sum(k) == 8 * layers and (min(k), max(k)) == (2, 16)


@pytest.mark.parametrize("row", families.ROWS)
def test_odd_budgets_of_other_families(row: str, tmp_path: Path) -> None:
    """Every k odd, the sum the model's own, one per MoE layer of the model that is written."""
    family, layers, k, changes = families.ROWS[row]
    model = dummy_models.write(family, tmp_path, layers, **changes, **families.TINY[family])
    file = dummy_models.write_scores(model, k, tmp_path / "scores.safetensors")
    config = json.loads((model / "config.json").read_text())
    assert all(each % 2 for each in k) and sum(k) == len(k) * config["num_experts_per_tok"]
    assert file.exists() and ("quantization_config" in config) == ("mxfp4" in row)


def test_families_are_judged() -> None:
    base = [-1.0] * 100
    moved = [-2.0] * 100
    assert families.judge(base, base, base, moved)["result"] == "passed"
    assert "no difference" in families.judge(base, base, base, base)["result"]
    assert "differ by more" in families.judge(base, base, [-1.2] * 10 + base[10:], moved)["result"]
    assert "finite" in families.judge([float("nan")], base, base, moved)["result"]
    assert families.judge(base, [float("nan")] * 100, base, moved)["result"] != "passed"


def test_distinct_experts_count_decode_steps_only() -> None:
    recorder = Recorder()
    recorder.start(2)
    layers = [recorder.of_layer(0), recorder.of_layer(1)]
    layers[0](torch.tensor([[0, 1], [2, 3], [4, 5]]))  # a prompt
    layers[0](torch.tensor([[0, 1, 1], [1, 2, 2]]))  # k = 2, padded to the widest layer's
    layers[1](torch.tensor([[7], [7]]))
    assert recorder.result() == {
        "batch": 2, "steps": 1, "distinct": 2.0, "per_layer": [3.0, 1.0], "sum_k": 3,
    }  # fmt: skip


def run_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.setenv("OUT", str(folder / "out"))
    argv = ["gpu", "--device", "cpu", "--output", str(folder / "run"), *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    return gpu.main()


def test_make_gpu_writes_what_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_gpu(monkeypatch, tmp_path, "--quick", "--parts", "kernel") == 0
    for folder in (tmp_path / "run", tmp_path / "out" / "run"):
        assert {path.name for path in folder.iterdir()} == {"kernel.csv", "summary.md", "environment.json"}
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "- kernel at most vLLM's op in geometric mean: not measured (needs a GPU)" in summary
    assert "| T " in summary and "- kernel: ended well" in summary
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["versions"]["torch"] and len(environment["sources"]) == 64
    assert "- kernel: ended well" in capsys.readouterr().out


def test_make_gpu_reports_failed_late_and_left_out_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that fails, one that hangs, one for which no time is left; what was said survives."""
    programs = {
        "kernel_check": "print('aim: a: met (1)', flush=True); raise SystemExit(3)",
        "kernel": """
import time
print("half a table", flush=True)
try:
    time.sleep(60)
finally:
    print("servers stopped", flush=True)""",
    }
    monkeypatch.setattr(gpu, "command_of", lambda part, *rest: [sys.executable, "-c", programs[part]])
    monkeypatch.setattr(gpu, "PATIENCE", 2)
    monkeypatch.setattr(gpu, "PARTS", {"kernel_check": 5, "kernel": 4, "serving": 0})
    budget = ["--budget-seconds", "6"]
    assert run_gpu(monkeypatch, tmp_path, *budget, "--parts", "kernel_check", "kernel", "serving") == 1
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "- a: met (1)" in summary and "\nhalf a table\n" in summary
    assert "\nservers stopped\n" in summary, "a part is interrupted before it is killed"
    assert "- kernel_check: failed with exit status 3" in summary
    assert "- kernel: cut off after" in summary and "- serving: not run, the time was up" in summary


def test_without_a_gpu_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 1
    assert capsys.readouterr().err == "make gpu: torch sees no GPU; `make bench` measures what a CPU can\n"


def test_the_plugin_is_found_without_installation(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "tools/metadata.py", str(tmp_path)], cwd=servers.ROOT, check=True)
    (folder,) = tmp_path.iterdir()
    assert "[vllm.general_plugins]\ncor = cor_vllm:register" in (folder / "entry_points.txt").read_text()


@pytest.mark.slow
def test_worker_extensions() -> None:
    """In a process of its own, since importing them changes vLLM and the router for good."""
    code = """
import torch
from cor_vllm.serve import router
from benchmarks.common import torch_router, dummy_weights
assert router.route.keywords == {"backend": "torch"}
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
assert DummyModelLoader.load_weights is dummy_weights.load_weights
class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(512, 64, bias=True)
        self.norm = torch.nn.LayerNorm(512)
        self.w13_weight_scale = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
one, two = Two(), Two()
for model in (one, two):
    DummyModelLoader.load_weights(None, model, None)
assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
logits = one.gate(torch.randn(1000, 512))
assert 1.8 < logits.std() < 2.2 and (one.norm.weight == 1).all() and (one.w13_weight_scale == 120).all()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=servers.ROOT, env=servers.Contestant("full", None, {}).env(),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
