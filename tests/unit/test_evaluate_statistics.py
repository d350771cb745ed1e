"""Paired comparisons: known answers, and the errors that they must not make."""

import math

import numpy as np
import pytest

from cor_vllm.evaluate.statistics import compare, holm


def scores(values: list[float]) -> dict[str, float]:
    return {f"item/{i}": value for i, value in enumerate(values)}


def test_mcnemar_counts_only_the_items_that_changed() -> None:
    # 9 gained, 1 lost, 90 as before: the exact two-sided p of 1 in 10 fair tosses.
    own = scores([1.0] * 9 + [0.0] + [1.0] * 90)
    other = scores([0.0] * 9 + [1.0] + [1.0] * 90)
    found = compare(own, other)
    assert found.test == "McNemar"
    assert found.p == pytest.approx(2 * (1 + 10) / 2**10)
    assert found.difference == pytest.approx(0.08)
    assert found.low < 0.08 < found.high


def test_the_interval_of_many_items_is_the_normal_one() -> None:
    generator = np.random.default_rng(0)
    own, other = generator.normal(0.3, 1, 2000), generator.normal(0, 1, 2000)
    found = compare(scores(own.tolist()), scores(other.tolist()))
    sem = (own - other).std(ddof=1) / math.sqrt(2000)
    assert found.low == pytest.approx(found.difference - 1.96 * sem, abs=0.1 * sem)
    assert found.high == pytest.approx(found.difference + 1.96 * sem, abs=0.1 * sem)
    assert found.test == "sign flips" and found.p < 0.001


def test_items_are_paired_by_name_and_not_by_order() -> None:
    own = {"a": 1.0, "b": 0.0, "c": 0.5}
    assert compare(own, dict(reversed(own.items()))).difference == 0


def test_the_same_thing_twice_is_no_difference() -> None:
    same = scores([0.1, 0.7, 0.3])
    found = compare(same, same)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_other_items_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="same items"):
        compare(scores([1.0, 0.0]), scores([1.0]))


def test_p_of_noise_is_uniform() -> None:
    """Where there is no effect, five percent of comparisons come out below 0.05."""
    generator = np.random.default_rng(1)
    found = [
        compare(scores(generator.normal(0, 1, 40).tolist()), scores(generator.normal(0, 1, 40).tolist()), i).p
        for i in range(100)
    ]
    assert 0 <= sum(p < 0.05 for p in found) <= 12  # 1 in 1,000 of the binomial lies beyond
    assert 35 <= sum(p < 0.5 for p in found) <= 65


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
