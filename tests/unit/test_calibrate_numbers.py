"""Strata, averages, shrinkage, intervals, budgets: the arithmetic between measurements and the file."""

import math
import statistics as plain_statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cor_vllm.calibrate.config import CalibrationError, CalibrationOptions
from cor_vllm.calibrate.result import statistics
from cor_vllm.calibrate.result.allocation import bounds, budget, move_units
from cor_vllm.calibrate.result.statistics import ExpertImpact
from cor_vllm.calibrate.text.stratify import flat_mask, locate, stratify

NATS = st.floats(-20, 20, allow_subnormal=False)


def options(**values: Any) -> CalibrationOptions:
    return CalibrationOptions(model="m", output="o", **values)  # type: ignore[arg-type]


def test_percentiles_are_linear_and_the_bounds_are_strict() -> None:
    losses = torch.arange(11, dtype=torch.float32)  # percentile p is p / 10
    strata = stratify(losses, 85, 20)
    assert (strata.tau_high, strata.tau_low) == pytest.approx((8.5, 2.0))
    assert strata.hard.nonzero().flatten().tolist() == [9, 10]
    assert strata.easy.nonzero().flatten().tolist() == [0, 1]


def test_given_positions_replace_hard_and_are_never_easy() -> None:
    given_ = torch.zeros(11, dtype=torch.bool)
    given_[[0, 5]] = True
    strata = stratify(torch.arange(11, dtype=torch.float32), 85, 20, given_)
    assert strata.hard.tolist() == given_.tolist()
    assert strata.easy.nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("losses", [[1.0] * 50, [1.0]])
def test_equal_losses_have_no_hard_position(losses: list[float]) -> None:
    with pytest.raises(CalibrationError, match="no hard position"):
        stratify(torch.tensor(losses), 90, 10)


def test_positions_and_masks_are_inverse() -> None:
    sequences = [[1] * 4, [1] * 2, [1] * 5]
    mask = flat_mask([[2], [], [0, 3]], sequences)
    assert mask.tolist() == [False, False, True, False, True, False, False, True]
    assert locate(mask, sequences) == [(0, 2), (2, 0), (2, 3)]


@settings(deadline=None)
@given(st.lists(NATS, min_size=1, max_size=30))
def test_mean_and_sem(values: list[float]) -> None:
    mean, sem = statistics.mean_and_sem(torch.tensor(values, dtype=torch.float64))
    assert mean == pytest.approx(plain_statistics.fmean(values), abs=1e-12)
    expected = plain_statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    assert sem == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 99))
def test_expert_impact_is_the_average_by_expert(hard: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    active = torch.stack([torch.randperm(6, generator=generator)[:k] for _ in range(hard)])
    changes = torch.randn(hard, k, generator=generator, dtype=torch.float64)
    impact = statistics.expert_impact(active, changes, 6)
    for expert in range(6):
        own = changes[active == expert].tolist()
        assert impact.count[expert] == len(own)
        assert impact.raw[expert].item() == pytest.approx(sum(own) / len(own) if own else 0.0, abs=1e-12)
        sem = plain_statistics.stdev(own) / math.sqrt(len(own)) if len(own) > 1 else 0.0
        assert impact.sem[expert].item() == pytest.approx(sem, abs=1e-12)


@settings(deadline=None)
@given(st.lists(NATS, min_size=1, max_size=20))
def test_normalised_values_span_zero_to_one(values: list[float]) -> None:
    raw = torch.tensor(values, dtype=torch.float64)
    cei = statistics.normalise(raw)
    assert cei.dtype == torch.float32
    if min(values) == max(values):
        assert cei.eq(0).all()
    else:
        assert cei.min() == 0 and cei.max() == 1
        assert cei[raw.argmax()] == 1 and cei[raw.argmin()] == 0


def test_relative_intensity() -> None:
    assert statistics.relative_intensity(0.3, 0.1, 0.05) == pytest.approx(2.0)
    assert statistics.relative_intensity(-0.3, 0.1, 0.0) == pytest.approx(-3.0)
    assert statistics.relative_intensity(0.3, -0.05, 0.05) == 0.0


def impact_of(raw: list[float], sem: list[float], count: list[int]) -> ExpertImpact:
    return ExpertImpact(
        torch.tensor(raw, dtype=torch.float64), torch.tensor(sem, dtype=torch.float64), torch.tensor(count)
    )


def test_shrinkage_by_hand() -> None:
    # τ² = mean(raw² − sem²) over the first three = (0.03 + 0.0375 + 0.0) / 3; the fourth was seen once and
    # takes the pooled variance of one sample, Σ (n−1)·n·sem² / Σ (n−1) = (0.12 + 0.03 + 0.06) / 8.
    impact = impact_of([0.2, -0.2, 0.1, 0.5, 0.0], [0.1, 0.05, 0.1, 0.0, 0.0], [4, 4, 3, 1, 0])
    tau = (0.03 + 0.0375 + 0.0) / 3
    pooled = (3 * 4 * 0.01 + 3 * 4 * 0.0025 + 2 * 3 * 0.01) / 8
    errors = [0.01, 0.0025, 0.01, pooled]
    expected = [raw * tau / (tau + error) for raw, error in zip([0.2, -0.2, 0.1, 0.5], errors, strict=True)]
    assert statistics.shrink(impact).tolist() == pytest.approx([*expected, 0.0])


def test_shrinkage_of_pure_noise_is_zero() -> None:
    assert statistics.shrink(impact_of([0.1, -0.1], [0.2, 0.3], [5, 5])).eq(0).all()
    assert statistics.shrink(impact_of([0.1, -0.1], [0.0, 0.0], [1, 1])).eq(0).all()


def test_shrinkage_of_exact_values_changes_nothing() -> None:
    raw = [0.3, -0.2, 0.0]
    assert statistics.shrink(impact_of(raw, [0.0] * 3, [9] * 3)).tolist() == pytest.approx(raw)


@settings(deadline=None)
@given(st.integers(0, 99))
def test_shrinkage_keeps_signs_and_never_grows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(8, generator=generator, dtype=torch.float64)
    sem = torch.rand(8, generator=generator, dtype=torch.float64)
    shrunk = statistics.shrink(ExpertImpact(raw, sem, torch.full((8,), 5)))
    assert (shrunk.abs() <= raw.abs()).all() and (shrunk * raw >= 0).all()


def test_bootstrap_interval_holds_a_clear_ratio_and_is_seeded() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = 1.0 + 0.1 * torch.randn(100, generator=generator)
    easy = 0.5 + 0.05 * torch.randn(100, generator=generator)
    low, high = statistics.intensity_interval(hard, easy, 1e-6, seed=1)
    assert 1.8 < low < 2.0 < high < 2.2
    assert (low, high) == statistics.intensity_interval(hard, easy, 1e-6, seed=1)
    # A denominator around zero has no bounded ratio.
    low, high = statistics.intensity_interval(hard, easy - 0.5, 1e-6, seed=1)
    assert low < -50 and high > 50


def test_split_half_correlation() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(10, generator=generator, dtype=torch.float64)
    active = torch.stack([torch.randperm(10, generator=generator)[:4] for _ in range(400)])
    noise = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    clear = statistics.split_half_correlation([(active, true[active] + 0.1 * noise)], 10, 0)
    empty = statistics.split_half_correlation([(active, noise)], 10, 0)
    assert clear is not None and clear > 0.95
    assert empty is not None and abs(empty) < 0.7
    # One expert far beyond the others carries Pearson's correlation by itself, not that of the ranks.
    lone = torch.where(active == 0, 50.0, 0.0)
    pearson = statistics.split_half_correlation([(active, lone + noise)], 10, 0)
    ranks = statistics.split_half_correlation([(active, lone + noise)], 10, 0, ranks=True)
    assert pearson is not None and pearson > 0.99
    assert ranks is not None and ranks < 0.9
    order = statistics.split_half_correlation([(active, true[active].exp() * 1e6)], 10, 0, ranks=True)
    assert order == pytest.approx(1.0)
    assert statistics.split_half_correlation([(active[:1], noise[:1])], 10, 0) is None
    assert statistics.split_half_correlation([(active, torch.zeros(400, 4))], 10, 0) is None


def test_default_bounds() -> None:
    assert bounds(options(), 128, 8) == (4, 16)
    assert bounds(options(), 6, 4) == (2, 6)
    assert bounds(options(), 8, 1) == (1, 2)
    assert bounds(options(k_min=3, k_max=9), 128, 8) == (3, 9)
    assert bounds(options(budget="paper"), 128, 8) == (1, 128)
    assert bounds(options(), 12, 8) == (4, 12), "groups of 16 experts may hold but 12 for one token"


@pytest.mark.parametrize("values", [{"k_min": 9}, {"k_max": 7}, {"k_max": 200}])
def test_bounds_that_do_not_hold_the_models_own(values: dict[str, int]) -> None:
    with pytest.raises(CalibrationError, match="must hold the model's own 8 experts"):
        bounds(options(**values), 128, 8)


def test_budget_rules() -> None:
    k, info = budget(options(intensity="ratio"), 128, 8, [1.0, 3.0])
    assert k == [4, 12]
    assert info.model_dump() == {"rule": "exact", "k_min": 4, "k_max": 16, "total": 16, "sum": 16}
    k, info = budget(options(budget="paper"), 16, 8, [-1.0, 2.0])
    assert k == [1, 16] and (info.total, info.sum) == (16, 17)


def test_units_move_from_the_cheapest_to_the_most_gaining_layer() -> None:
    sem = 0.01
    marginal = [
        ((0.5, sem), (-0.1, sem)),  # dear to take from, gains a little
        ((0.02, sem), (0.3, sem)),  # cheap to take from
        ((0.4, sem), (-0.6, sem)),  # gains most
        ((0.05, sem), (0.2, sem)),  # second cheapest
    ]
    assert move_units(marginal, 4, 2, 8) == [5, 3, 5, 3]
    assert move_units(marginal, 4, 4, 8) == [4] * 4, "k_min holds every giver back"
    assert move_units(marginal, 4, 2, 4) == [4] * 4, "k_max holds every taker back"


def test_units_do_not_move_for_noise() -> None:
    marginal = [((0.0, 0.1), (-0.1, 0.1)), ((0.05, 0.1), (-0.2, 0.1))]
    assert move_units(marginal, 4, 2, 8) == [4, 4]


def test_a_layer_never_trades_with_itself_and_missing_sides_are_skipped() -> None:
    assert move_units([((-0.5, 0.0), (-0.5, 0.0))], 4, 2, 8) == [4]
    assert move_units([(None, (-0.5, 0.0)), ((0.1, 0.0), None)], 1, 1, 2) == [1, 1]
    assert move_units([(None, (-0.5, 0.0)), ((0.1, 0.0), None)], 2, 1, 2) == [2, 2]


ESTIMATES = st.tuples(st.floats(-1, 1), st.floats(0, 0.2))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(ESTIMATES, ESTIMATES), min_size=1, max_size=8))
def test_moving_units_keeps_the_sum_and_one_unit_a_layer(marginal: list[Any]) -> None:
    k = move_units(marginal, 4, 2, 8)
    assert sum(k) == 4 * len(k) and all(abs(value - 4) <= 1 for value in k)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"delta": 0}, "perturbs nothing"),
        ({"easy_percentile": 95}, "must not exceed"),
        ({"positions": "p.json"}, "give them with --token-ids"),
        ({"answers": "a.jsonl", "token_ids": "t.json"}, "give one"),
        ({"budget": "paper", "intensity": "marginal"}, "marginal"),
        ({"budget": "paper", "k_min": 2}, "do not apply"),
        ({"k_min": 5, "k_max": 4}, "exceeds"),
        ({"tune": True, "heldout_tokens": 1}, "at least 2"),
        ({"tune": True, "token_ids": "t.json"}, "--corpus"),
        ({"num_tokens": 0}, "greater than or equal"),
        ({"seq_len": 1}, "greater than or equal"),
        ({"epsilon": 0}, "greater than 0"),
        ({"epsilon": float("nan")}, "finite"),
        ({"seed": -1}, "greater than or equal"),
        ({"algorithm": "magic"}, "plain"),
        ({"no_such_option": 1}, "not permitted"),
    ],
)
def test_options_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**values)
