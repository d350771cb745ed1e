"""The budget: exact sum, bounds, proportionality, ties (docs/reference/method.md, "Budget")."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cor_vllm.budget import allocate, allocate_paper

finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], int, int, int]:
    intensity = draw(st.lists(finite, min_size=1, max_size=40))
    k_min = draw(st.integers(1, 20))
    k_max = draw(st.integers(k_min, 40))
    total = draw(st.integers(len(intensity) * k_min, len(intensity) * k_max))
    return intensity, total, k_min, k_max


@given(problems())
def test_sum_and_bounds_hold_for_any_intensities(problem):
    intensity, total, k_min, k_max = problem
    k = allocate(intensity, total, k_min, k_max)
    assert len(k) == len(intensity)
    assert sum(k) == total
    assert all(k_min <= value <= k_max for value in k)


@given(problems())
def test_a_more_intense_layer_never_gets_fewer(problem):
    intensity, total, k_min, k_max = problem
    k = allocate(intensity, total, k_min, k_max)
    positive = [max(r, 0.0) for r in intensity]
    for a in range(len(k)):
        for b in range(len(k)):
            if positive[a] > positive[b]:
                assert k[a] >= k[b]
            if positive[a] == positive[b] and a < b:
                assert k[a] >= k[b]  # ties to the lower layer


@given(problems(), st.integers(-10, 10))
def test_scale_does_not_matter(problem, exponent):
    intensity, total, k_min, k_max = problem
    intensity = [max(min(r, 1e100), -1e100) if abs(r) > 1e-100 else 0.0 for r in intensity]
    scaled = [2.0**exponent * r for r in intensity]  # exact in floating point
    assert allocate(scaled, total, k_min, k_max) == allocate(intensity, total, k_min, k_max)


def test_quotas_are_proportional_inside_the_bounds():
    assert allocate([1, 2, 3, 4], 20, 1, 16) == [2, 4, 6, 8]


def test_water_filling_hands_on_what_a_bound_takes():
    # Proportional quotas are 1.6, 1.6, 12.8; 8 is the most, so the others share 8 in equal parts.
    assert allocate([1, 1, 8], 16, 1, 8) == [4, 4, 8]
    assert allocate([1, 1, 8], 12, 3, 8) == [3, 3, 6]


def test_largest_remainder_takes_the_leftover():
    assert allocate([1.0, 1.0, 1.0], 4, 1, 4) == [2, 1, 1]
    assert allocate([5.4, 2.7, 1.9], 10, 1, 10) == [5, 3, 2]


@pytest.mark.parametrize("intensity", [[0.0, 0.0], [-1.0, -5.0]])
def test_no_positive_intensity_is_uniform(intensity):
    assert allocate(intensity, 16, 4, 16) == [8, 8]


def test_one_positive_layer_takes_all_it_may():
    assert allocate([-1.0, 3.0, 0.0], 24, 4, 16) == [4, 16, 4]
    assert allocate([-1.0, 3.0, 0.0], 30, 4, 16) == [7, 16, 7]


@pytest.mark.parametrize(
    ("intensity", "total", "k_min", "k_max", "says"),
    [
        ([1.0, math.nan], 8, 1, 8, "finite"),
        ([1.0, math.inf], 8, 1, 8, "finite"),
        ([1.0, 1.0], 20, 1, 8, "fit"),
        ([1.0, 1.0], 1, 1, 8, "fit"),
        ([1.0], 4, 0, 8, "k_min"),
        ([1.0], 4, 5, 4, "k_min"),
    ],
)
def test_impossible_budgets_are_refused(intensity, total, k_min, k_max, says):
    with pytest.raises(ValueError, match=says):
        allocate(intensity, total, k_min, k_max)


def test_paper_rule_can_miss_the_budget():
    assert allocate_paper([1.0, 1.0, 1.0], 8, 8) == [3, 3, 3]  # 2.67 each: one too many
    assert allocate_paper([1.0, 0.0], 16, 8) == [8, 1]  # no layer below 1 or above N
    assert allocate_paper([-1.0, -1.0], 8, 8) == [4, 4]


@given(st.lists(finite, min_size=1, max_size=40), st.integers(1, 64), st.integers(1, 500))
def test_paper_rule_stays_in_range(intensity, num_experts, total):
    assert all(1 <= k <= num_experts for k in allocate_paper(intensity, total, num_experts))
