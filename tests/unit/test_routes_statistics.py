"""The statistics of a route analysis, each held against numbers that are known or counted another way."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch

from cor_vllm.calibrate.interventions.attention import Places
from cor_vllm.calibrate.routes import bootstrap, statistics
from cor_vllm.calibrate.routes.bootstrap import document_sums, holm, resampled_means
from cor_vllm.calibrate.routes.draw import uniform_noise
from cor_vllm.calibrate.routes.groups import balanced, further_groups, only, probability_groups
from cor_vllm.calibrate.routes.standard import LastInputs, ScoredText, token_keys
from cor_vllm.calibrate.routes.utilities import Standard, Utilities


def utilities(
    utility: torch.Tensor, scores: torch.Tensor | None = None, ids: torch.Tensor | None = None
) -> Utilities:
    """Of [T, 1+G, 1+J] log-probabilities whose routes all differ."""
    tokens, routes, _ = utility.shape
    first = torch.arange(routes).expand(tokens, -1)
    given_scores = torch.zeros(tokens, routes) if scores is None else scores
    return Utilities(0, utility.float(), first, given_scores, given_scores.exp(), ids)


def random_utilities(tokens: int, draws: int, seed: int = 0) -> Utilities:
    return utilities(-torch.rand(tokens, 1 + draws, 2, generator=torch.Generator().manual_seed(seed)))


def test_the_measures_of_one_token_by_hand() -> None:
    """Standard −2; alternatives −1, −2.0001 and −3, of which the first was drawn twice."""
    column = torch.tensor([-2.0, -1.0, -1.0, -2.0001, -3.0])
    scores = torch.ones(1, 5)
    utility = column[None, :, None].expand(1, -1, 2)
    one = Utilities(0, utility, torch.tensor([[0, 1, 1, 3, 4]]), scores, scores, None)
    found = {name: values[0, 0].item() for name, values in statistics.token_measures(one, 1e-3).items()}
    assert found["regret"] == found["best_alternative"] == pytest.approx(1)
    assert found["gap"] == pytest.approx(np.exp(-1) - np.exp(-2))
    assert found["rank_share"] == found["tie_share"] == pytest.approx(1 / 3)
    assert (found["any_better"], found["top_1"], found["top_4"]) == (1, 0, 1)
    assert found["mean_change"] == pytest.approx((1 + 1 - 0.0001 - 1) / 4)


def test_a_standard_route_that_is_best_has_no_regret() -> None:
    best = utilities(torch.tensor([-1.0, -2.0, -3.0])[None, :, None].expand(1, -1, 2))
    found = {name: values[0, 1].item() for name, values in statistics.token_measures(best, 0.0).items()}
    assert (found["regret"], found["gap"], found["any_better"], found["top_1"]) == (0, 0, 0, 1)
    assert found["best_alternative"] == -1


def test_without_an_alternative_shares_are_undefined_and_regret_is_zero() -> None:
    same = Utilities(
        0, -torch.ones(1, 3, 2), torch.zeros(1, 3).long(), torch.ones(1, 3), torch.ones(1, 3), None
    )
    found = statistics.token_measures(same, 0.0)
    assert found["regret"].tolist() == [[0, 0]]
    for name in ("best_alternative", "rank_share", "tie_share", "correlation", "correlation_drawn"):
        assert found[name].isnan().all(), name


def test_rounding_is_what_the_two_computations_differ_by() -> None:
    one = random_utilities(1000, 3)
    standard = standard_of(one.utility[:, 0] + 0.25)
    assert statistics.rounding(standard, one) == pytest.approx(0.5)


def standard_of(log_prob: torch.Tensor, documents: int = 40) -> Standard:
    tokens = len(log_prob)
    number = torch.arange(tokens)
    places = Places(number % documents, number // documents)
    return Standard(places, number % documents, number * 7919, torch.zeros(tokens, 2).long(), log_prob, [])


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_that_are_the_utility_correlate_at_one(sign: int) -> None:
    utility = random_utilities(5, 12).utility
    found = statistics.token_measures(utilities(utility, sign * utility[:, :, 0]), 0.0)
    for name in ("correlation", "correlation_drawn", "correlation_sum", "correlation_sum_drawn"):
        assert found[name][:, 0].tolist() == pytest.approx([sign] * 5)


def test_shuffled_scores_do_not_correlate() -> None:
    utility = random_utilities(2000, 12).utility
    scores = torch.rand(2000, 13, generator=torch.Generator().manual_seed(5))
    found = statistics.token_measures(utilities(utility, scores), 0.0)["correlation"][:, 0]
    assert abs(found.mean().item()) < 4 * found.std().item() / 2000**0.5


def test_ties_get_their_mean_rank_and_are_undefined_if_all_tie() -> None:
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(2)
    scores, utility = (torch.randint(0, 6, (30, 9), generator=generator).float() for _ in range(2))
    chosen = torch.rand(30, 9, generator=generator) < 0.8
    found = statistics.rank_correlation(scores, utility, chosen)
    for row in range(30):
        expected = spearmanr(scores[row][chosen[row]], utility[row][chosen[row]]).statistic
        assert found[row].item() == pytest.approx(expected)
    flat = torch.ones(1, 9)
    every = torch.ones(1, 9, dtype=torch.bool)
    assert statistics.rank_correlation(flat, utility[:1], every).isnan().all()
    assert statistics.rank_correlation(scores[:1], utility[:1] / 1e6, every, epsilon=1e-3).isnan().all()


def test_more_draws_never_lower_the_regret() -> None:
    all_draws = random_utilities(50, 16)
    before = torch.zeros(50, 2).double()
    for draws in range(1, 17):
        regret = statistics.token_measures(utilities(all_draws.utility[:, : 1 + draws]), 0.0)["regret"]
        assert (regret >= before).all()
        before = regret


def test_saturation_is_the_mean_over_all_subsets_of_the_draws() -> None:
    one = random_utilities(4, 6)
    change = (one.utility[:, 1:] - one.utility[:, :1]).double().clamp_min(0)
    found = statistics.saturation(one)
    assert statistics.draw_counts(6) == [1, 2, 4, 6]
    for n, size in enumerate([1, 2, 4, 6]):
        subsets = [change[:, list(chosen)].amax(dim=1) for chosen in combinations(range(6), size)]
        assert len(subsets) == comb(6, size)
        torch.testing.assert_close(found[:, n], torch.stack(subsets).mean(dim=0))


@pytest.mark.parametrize(("draws", "counts"), [(1, [1]), (2, [1, 2]), (32, [1, 2, 4, 8, 16, 32])])
def test_the_numbers_of_draws_end_with_all(draws: int, counts: list[int]) -> None:
    assert statistics.draw_counts(draws) == counts


def test_slots_that_the_best_routes_gain_and_lose() -> None:
    """Two tokens, standard {0, 1}: the first is better off with {1, 2}, the second stays."""
    utility = torch.tensor([[-2.0, -1.0], [-1.0, -2.0]])[:, :, None].repeat(1, 1, 2)
    utility[0, :, 1] = torch.tensor([-1.0, -2.0])
    ids = torch.tensor([[[0, 1], [1, 2]]] * 2, dtype=torch.int16)
    changes = statistics.slot_changes(utilities(utility, ids=ids), torch.ones(2, 2).bool(), 4, 0.0)
    assert changes is not None
    assert changes[0].tolist() == [-0.25, 0, 0.25, 0] and changes[1].tolist() == [0, 0, 0, 0]
    assert statistics.slot_changes(utilities(utility), torch.ones(2, 2).bool(), 4, 0.0) is None


def test_each_target_is_in_the_group_of_its_own_probability() -> None:
    p = torch.tensor([[0.91, 0.1], [0.89, 1.0], [0.5, 0.49]])
    confident, ambiguous, fragile = probability_groups(p.log(), (0.9, 0.49999))
    assert confident.mask.tolist() == [[True, False], [False, True], [False, False]]
    assert ambiguous.mask.tolist() == [[False, False], [True, False], [True, False]]
    assert fragile.mask.tolist() == [[False, True], [False, False], [False, True]]
    assert fragile.share == (0, pytest.approx(2 / 3))


def test_a_probability_at_the_edge_is_in_the_upper_group_alone() -> None:
    log_prob = torch.tensor([[-0.1], [-0.7]]).double()
    edges = log_prob.exp().flatten().tolist()
    groups = probability_groups(log_prob, edges)
    assert [group.mask.flatten().tolist() for group in groups] == [[True, False], [False, True], [False] * 2]


def test_a_tenth_of_the_tokens_is_in_each_decile() -> None:
    every, *tenths = further_groups(torch.rand(1000, 2, generator=torch.Generator().manual_seed(0)).log())
    assert every.mask.all()
    assert [int(tenth.mask[:, 0].sum()) for tenth in tenths] == [100] * 10
    assert sum(int(tenth.mask[:, 1].sum()) for tenth in tenths) == 1000


def test_quotas_are_equal_and_do_not_look_at_the_outcome() -> None:
    log_prob = torch.rand(3000, 2, generator=torch.Generator().manual_seed(1)).pow(0.2).log()
    standard = standard_of(log_prob)
    groups = probability_groups(log_prob, (0.9, 0.5))
    counted = balanced(standard.keys, groups, 300)
    assert [[int((counted & group.mask)[:, j].sum()) for j in (0, 1)] for group in groups] == [[50, 50]] * 3
    assert int(counted.any(dim=1).sum()) <= 300
    assert torch.equal(counted, balanced(standard.keys, groups, 300))
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(2))
    shuffled = probability_groups(log_prob[order], (0.9, 0.5))
    assert torch.equal(balanced(standard.keys[order], shuffled, 300), counted[order])


def test_a_group_with_fewer_than_its_quota_gives_all_that_it_has() -> None:
    log_prob = torch.full((100, 2), 0.2).log()
    log_prob[:3] = 0.0
    counted = balanced(torch.arange(100), probability_groups(log_prob, (0.9, 0.5)), 60)
    assert int(counted[:3].sum()) == 6 and int(counted[3:, 0].sum()) == 10


def test_only_the_chosen_positions_are_left() -> None:
    text = ScoredText("t", "0" * 64, [[1] * 6, [2] * 4], [[0, 2, 4], [1, 2]], [0, 1])
    places = text.places()
    values = torch.arange(5)
    whole = Standard(places, values, values, values[:, None], values[:, None].float(), [values[:, None]])
    rows = torch.tensor([True, False, True, False, True])
    part_text, standard, last = only(rows, text, whole, LastInputs(values[:, None], values[:, None]))
    assert part_text.positions == [[0, 4], [2]]
    assert standard.keys.tolist() == [0, 2, 4] and standard.router_logits[0][:, 0].tolist() == [0, 2, 4]
    assert part_text.places().position.tolist() == standard.places.position.tolist()
    assert last is not None and last.x[:, 0].tolist() == [0, 2, 4]


def test_means_and_intervals_of_documents_by_hand() -> None:
    """Means over tokens, not over documents; each draw of documents again in a loop."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(200, 2, generator=generator).double()
    mask = torch.rand(200, 2, generator=generator) < 0.7
    document = torch.arange(200) % 25
    values[0, 0] = torch.nan
    [found] = resampled_means([document_sums(values, mask, document)], seed=4, draws=50)
    defined = mask & ~values.isnan()
    realised, null = (values[:, j][defined[:, j]].mean().item() for j in (0, 1))
    assert (found.realised, found.null) == (pytest.approx(realised), pytest.approx(null))
    assert found.excess == pytest.approx(realised - null)
    drawn = []
    for row in np.random.default_rng(4).integers(25, size=(50, 25)):
        tokens = [t for d in row for t in range(200) if document[t] == d]
        means = [values[tokens, j][defined[tokens, j]].mean().item() for j in (0, 1)]
        drawn.append(means[0] - means[1])
    assert found.excess_interval == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist())


def test_realised_and_null_are_drawn_together() -> None:
    """Documents differ much, but the two sides differ by the same number everywhere."""
    null = torch.arange(60).double() % 30 * 10
    values = torch.stack([null + 1, null], dim=1)
    sums = document_sums(values, torch.ones(60, 2).bool(), torch.arange(60) % 30)
    [found] = resampled_means([sums], seed=0)
    assert found.excess_interval == (pytest.approx(1), pytest.approx(1))
    assert found.null_interval is not None and found.null_interval[1] - found.null_interval[0] > 10


def test_too_few_documents_have_no_interval_and_no_tokens_no_mean() -> None:
    document = torch.arange(40) % (bootstrap.FEWEST_DOCUMENTS - 1)
    values = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.ones(40, 2).bool()
    [few, none] = resampled_means(
        [document_sums(values, mask, document), document_sums(values, ~mask, document)], seed=0
    )
    assert few.excess is not None and few.excess_interval is None and few.p is None
    assert none.realised is None and none.excess is None and none.excess_interval is None


def test_p_values_are_corrected_for_their_number() -> None:
    corrected = holm([0.01, None, 0.04, 0.03, 0.005])
    assert corrected == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06), 0.02]
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_noise_has_a_place_for_every_seed_and_layer() -> None:
    """A product beyond 64 bits wraps around instead of failing."""
    sequences, places = [[1, 2]], Places(torch.zeros(1).long(), torch.zeros(1).long())
    keys = [token_keys(sequences, places, seed).item() for seed in (0, 30, 2**31 - 1)]
    assert len(set(keys)) == 3
    noise = [uniform_noise(torch.tensor([5]), layer, 1, torch.zeros(1, 1).long()) for layer in (0, 60)]
    assert noise[0] != noise[1]
