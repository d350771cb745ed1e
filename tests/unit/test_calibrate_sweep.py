"""The sweep against the plain algorithm, its oracle, on every supported family and option."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cor_vllm.calibrate.config import CalibrationError, CalibrationOptions
from cor_vllm.calibrate.interventions.measurement import LayerMeasurement, baseline
from cor_vllm.calibrate.interventions.plain import PlainAlgorithm
from cor_vllm.calibrate.interventions.sweep import Sweep
from cor_vllm.calibrate.model.layers import chunks
from cor_vllm.calibrate.model.loading import load_model
from cor_vllm.calibrate.model.memory import bytes_per_row
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.text.inputs import read_inputs
from cor_vllm.calibrate.text.stratify import Strata, stratify
from cor_vllm.testing import tiny_models

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"


def options(**values: Any) -> CalibrationOptions:
    return CalibrationOptions(model="m", output="o", **values)  # type: ignore[arg-type]


class Case:
    """A tiny model, with sequences of unequal length beyond its sliding window, and their strata."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> None:
        self.model = MoeModel(tiny_models.create(name, **overrides).to(dtype))
        generator = torch.Generator().manual_seed(3)
        self.sequences = [
            torch.randint(0, tiny_models.VOCAB, (length,), generator=generator).tolist()
            for length in (13, 40, 7, 21)
        ]
        self.base = baseline(self.model, self.sequences)
        self.strata = stratify(self.base.losses, 88, 15)

    def plain(self, **values: Any) -> list[LayerMeasurement]:
        return self.measure(PlainAlgorithm, options(algorithm="plain", **values))

    def sweep(self, **values: Any) -> list[LayerMeasurement]:
        return self.measure(Sweep, options(**values))

    def measure(self, algorithm: Any, chosen: CalibrationOptions) -> list[LayerMeasurement]:
        return self.run(algorithm(self.model, chosen, self.sequences, self.base, self.strata))

    @staticmethod
    def run(algorithm: Any) -> list[LayerMeasurement]:
        for step in range(len(algorithm.work())):
            algorithm.step(step)
        result: list[LayerMeasurement] = algorithm.result()
        return result


YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 16,
}  # fmt: skip
TOLERANCE = 5e-6  # nats, float32: a few units in the last place of a loss of 5 to 10 nats
OPTIONS: list[dict[str, Any]] = [
    {"ablation": "backfill", "intensity": "marginal"},
    {"ablation": "drop", "perturb_target": "layer"},
    {"perturb_scope": "token", "intensity": "marginal"},
    {"perturb_scope": "token", "perturb_target": "layer", "ablation": "drop"},
]


def compare(one: list[LayerMeasurement], other: list[LayerMeasurement], tolerance: float) -> None:
    moved = 0.0
    for a, b in zip(one, other, strict=True):
        assert a.tensors().keys() == b.tensors().keys()
        for name, values in a.tensors().items():
            assert values.dtype == b.tensors()[name].dtype
            torch.testing.assert_close(values, b.tensors()[name], rtol=1e-5, atol=tolerance)
        moved = max(moved, a.ablation.abs().max().item())
    assert moved > 0.1, "these interventions must matter, or the comparison shows nothing"


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("values", OPTIONS)
def test_the_sweep_is_plain(case: Case, values: dict[str, Any]) -> None:
    compare(case.plain(**values), case.sweep(**values), TOLERANCE)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_in_float64_nothing_but_the_rounding_of_the_loss_remains(family: str) -> None:
    """Logits become float32 before the loss, so equal logits give equal losses."""
    case = Case(family, torch.float64)
    compare(case.plain(**OPTIONS[0]), case.sweep(**OPTIONS[0]), 1e-9)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mixtral", {"sliding_window": 8}),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 8, "num_experts_per_tok": 1},
        ),  # no fewer
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("olmoe", {"num_experts": 3, "clip_qkv": 0.5}),  # all active: no more
        ("deepseek_v2", {"q_lora_rank": 24}),
        ("deepseek_v3", {"q_lora_rank": 24, "rope_parameters": YARN, "rope_interleave": False}),
        ("deepseek_v3", {"num_experts_per_tok": 8}),  # all of the groups kept: no more
        ("gpt_oss", {"num_key_value_heads": 2, "num_attention_heads": 4}),
    ],
)
def test_windows_scaled_positions_clipping_and_edges_of_top_k(family: str, overrides: dict[str, Any]) -> None:
    case = Case(family, **overrides)
    compare(case.plain(**OPTIONS[0]), case.sweep(**OPTIONS[0]), TOLERANCE)


def test_windows_and_scaled_positions_are_seen_by_the_test() -> None:
    """They must change something, or the test above shows nothing."""
    for family, overrides in (("mixtral", {"sliding_window": 8}), ("deepseek_v3", {"rope_parameters": YARN})):
        plain, changed = Case(family), Case(family, **overrides)
        assert (plain.base.losses - changed.base.losses).abs().max() > 0.1


def test_small_blocks_give_the_same(case: Case) -> None:
    """Blocks end within a layer's new variants, and every sequence is a chunk of its own."""
    row = bytes_per_row(case.model.config, 40, 4)
    for values in (OPTIONS[0], OPTIONS[2]):
        blocked = case.sweep(max_memory=40 * row, **values)
        compare(case.sweep(**values), blocked, TOLERANCE)


def test_interventions_leave_the_model_as_it_was(case: Case) -> None:
    before = case.model.config._attn_implementation
    case.sweep()
    assert case.model.config._attn_implementation == before
    assert torch.equal(baseline(case.model, case.sequences).losses, case.base.losses)


def test_positions_without_any_measured_one(case: Case) -> None:
    """A sequence, and a chunk, with neither hard nor easy positions."""
    hard, easy = torch.zeros_like(case.strata.hard), torch.zeros_like(case.strata.easy)
    hard[[13, 30]], easy[14] = True, True  # all in the second sequence
    strata = Strata(hard, easy, 0.0, 0.0)
    chosen = options(max_memory=40 * bytes_per_row(case.model.config, 40, 4))
    results = [
        Case.run(algorithm(case.model, chosen, case.sequences, case.base, strata))
        for algorithm in (PlainAlgorithm, Sweep)
    ]
    compare(*results, TOLERANCE)


def test_progress_is_the_work_announced(case: Case) -> None:
    for values in OPTIONS:
        done: list[int] = []
        sweep = Sweep(case.model, options(**values), case.sequences, case.base, case.strata, done.append)
        for step, rows in enumerate(sweep.work()):
            done.clear()
            sweep.step(step)
            assert sum(done) == rows


def test_blocks_stay_within_the_bound(case: Case) -> None:
    """Memory that the CPU allocates during layer calls, seen by torch's own profiler, beside the buffers."""
    row = bytes_per_row(case.model.config, 40, 4)
    for rows in (40, 160):
        sweep = Sweep(case.model, options(max_memory=rows * row), case.sequences, case.base, case.strata)
        peak = peak_memory(lambda sweep=sweep: sweep.step(2))
        assert row < peak < rows * row, (peak, rows * row)


def peak_memory(action: Callable[[], None]) -> int:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        action()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_chunks_hold_consecutive_sequences_and_no_more_rows_than_allowed() -> None:
    sequences = [[0] * length for length in (5, 9, 2, 2, 2, 12, 3)]
    assert chunks(sequences, 12) == [range(1), range(1, 2), range(2, 5), range(5, 6), range(6, 7)]
    assert chunks(sequences, 18) == [range(2), range(2, 5), range(5, 6), range(6, 7)]
    assert chunks(sequences, 10**6) == [range(7)]


def test_too_little_memory_for_one_sequence(case: Case) -> None:
    with pytest.raises(CalibrationError, match=r"--max-memory 1000: the longest sequence, 40 tokens, needs"):
        case.sweep(max_memory=1000)


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("1.5 KiB", 1536), ("12", 12), ("3mib", 3 * 2**20)]
)
def test_sizes(text: str, size: int) -> None:
    assert options(max_memory=text).max_memory == size


@pytest.mark.parametrize("text", ["GB", "2 potatoes", "-1GB", "0", "1e9", ""])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValidationError):
        options(max_memory=text)


def test_sequence_scope_ablation_is_plains() -> None:
    assert options().algorithm == "sweep"
    assert options(scope="sequence").algorithm == "plain"
    with pytest.raises(ValidationError, match=r"--scope sequence .* the sweep does not cover"):
        options(scope="sequence", algorithm="sweep")


def test_a_layer_that_mixes_positions_is_refused() -> None:
    case = Case("olmoe")
    layer = case.model.model.model.layers[1]
    layer.register_forward_hook(lambda module, args, output: output + output.mean(dim=1, keepdim=True))
    with pytest.raises(
        CalibrationError, match=r"olmoe: decoder layer 1 computes a single position otherwise"
    ):
        case.sweep()


def test_attention_outside_the_registry_is_refused() -> None:
    case = Case("mixtral")
    attention = case.model.model.model.layers[2].self_attn
    attention.forward = lambda hidden_states, **arguments: (hidden_states, None)
    with pytest.raises(CalibrationError, match=r"mixtral: a layer called .* function 0 times"):
        case.sweep()


def test_unknown_arguments_of_attention_are_refused() -> None:
    case = Case("qwen3_moe")
    attention = case.model.model.model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda **arguments: forward(**arguments, new_option=30.0)
    with pytest.raises(CalibrationError, match="qwen3_moe: its attention takes new_option"):
        case.sweep()


def test_attention_without_a_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("mixtral")
    monkeypatch.setattr(case.model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(CalibrationError, match="mixtral: attention implementation 'flash_attention_2'"):
        case.sweep()


def test_a_window_that_the_mask_does_not_show_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("mixtral", sliding_window=4)
    monkeypatch.setattr(
        "cor_vllm.calibrate.interventions.attention.visible_before",
        lambda mask, length: torch.ones(length, length, dtype=torch.bool).tril(-1),
    )
    with pytest.raises(CalibrationError, match="mixtral: decoder layer 0 computes a single position"):
        case.sweep()


def test_rotary_embeddings_that_depend_on_the_length_are_refused() -> None:
    case = Case("qwen3_moe")
    case.model.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(CalibrationError, match="qwen3_moe: rotary embedding 'dynamic'"):
        case.sweep()


def test_on_the_demo_model() -> None:
    """Trained weights and real text, where a loss is sometimes small and a router sometimes sure."""
    chosen = {"model": str(DEMO), "output": "o", "num_tokens": 90, "seq_len": 48, "heldout_tokens": 0}
    inputs = read_inputs(CalibrationOptions(**chosen), DEMO, 4096)
    model = load_model(DEMO, "auto", "cpu")
    base = baseline(model, inputs.sequences)
    strata = stratify(base.losses, 90, 10)
    results = []
    for algorithm in (PlainAlgorithm, Sweep):
        options_ = CalibrationOptions(**chosen, intensity="marginal")
        results.append(Case.run(algorithm(model, options_, inputs.sequences, base, strata)))
    compare(*results, 1e-5)  # losses reach 15 nats, so a unit in the last place is 1e-6
