"""Routes of equal compute: how they are drawn, and what they are worth at the last layer."""

import itertools
import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare

from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.router import Router
from cor_vllm.calibrate.routes.closed_form import LastLayer, last_layer_utilities, route_utilities
from cor_vllm.calibrate.routes.draw import (
    DrawOptions,
    Routes,
    draw_ranks,
    draw_routes,
    routes_of,
    selection_scores,
    uniform_noise,
)
from cor_vllm.calibrate.routes.standard import LastInputs, ScoredText, draw_targets, read_standard
from cor_vllm.calibrate.routes.utilities import Standard
from cor_vllm.kernels.scoring import Scoring
from cor_vllm.testing import tiny_models
from tests.planted import EXPERTS, PLANTED, TOP_K, planted
from tests.unit.test_calibrate_oracle import WEIGHTS

OPTIONS = DrawOptions(routes=8)


def text_of(lengths: list[int], seed: int = 0) -> ScoredText:
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(256, (length,), generator=generator).tolist() for length in lengths]
    positions = [list(range(length - 1)) for length in lengths]
    return ScoredText("random", "0" * 64, sequences, positions, list(range(len(lengths))))


class Case:
    """A tiny model and what it says of a text."""

    def __init__(self, family: str) -> None:
        self.model = MoeModel(tiny_models.create(family))
        self.text = text_of([9, 14, 5])
        self.standard: Standard
        self.inputs: LastInputs
        self.standard, inputs = read_standard(self.model, self.text, seed=1, nulls=2)
        assert inputs is not None
        self.inputs = inputs
        self.utilities = last_layer_utilities(self.model, inputs, self.standard, OPTIONS)


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_the_standard_route_in_closed_form_is_the_full_forward(case):
    """Shared experts, scaling, sigmoid scores, groups and biases included."""
    assert (case.utilities.utility[:, 0] - case.standard.log_prob).abs().max() < 1e-4
    losses = torch.cat([case.model.losses(torch.tensor([ids]))[0] for ids in case.text.sequences])
    assert (case.standard.log_prob[:, 0] + losses).abs().max() < 1e-4


def every_route(router: Router, logits: torch.Tensor, eligible: int) -> Routes:
    """All sets of k of the experts that each token can choose among, the standard one first."""
    probs, scores = selection_scores(router, logits)
    pool = router.select(probs, scores, eligible)[1].long()
    ranks = torch.tensor(list(itertools.combinations(range(eligible), router.top_k)))
    return routes_of(
        router, probs, scores.gather(1, pool), pool, ranks[None].expand(len(logits), -1, -1).contiguous()
    )


def test_every_route_of_the_last_layer_is_what_the_whole_model_makes_of_it(case, request):
    """Each set of experts, forced on one position of a full forward, with weights that are computed here."""
    renormalise, scale = WEIGHTS[request.node.callspec.params["case"]]
    model, last = case.model, case.model.num_layers - 1
    rows = torch.tensor([3, 12])
    routes = every_route(model.routers[last], case.standard.router_logits[last][rows], model.eligible_experts)
    part = LastLayer.of(model)
    outputs = part.expert_outputs(case.inputs.x[rows], routes.pool)
    with torch.inference_mode():
        found = route_utilities(
            part, outputs, case.inputs.residual[rows], routes, case.standard.targets[rows]
        )
    for token, row in enumerate(rows.tolist()):
        sequence, position = (int(v[row]) for v in vars(case.standard.places).values())
        ids = torch.tensor([case.text.sequences[sequence]])
        where = torch.zeros(ids.shape, dtype=torch.bool)
        where[0, position] = True
        expected = []
        for route in routes.ids[token].tolist():

            def rule(logits, route=route):
                probs = model.routers[last].probabilities(logits)
                weights = probs[:, route] / (probs[:, route].sum(1, keepdim=True) if renormalise else 1)
                return weights * scale, torch.tensor(route).expand(len(logits), -1)

            with model.routing({last: rule}, where):
                expected.append(-model.losses(ids)[0, position])
        assert torch.allclose(found[token, :, 0], torch.stack(expected), atol=1e-4)
        assert found[token, :, 0].argmax() == torch.stack(expected).argmax()


def test_the_standard_route_is_the_models_own_and_never_beats_itself(case):
    router, logits = case.model.routers[-1], case.standard.router_logits[-1]
    own = router.route(logits)[1].long().sort(dim=1).values
    assert torch.equal(case.utilities.ids[:, 0].long(), own)
    regret = case.utilities.utility.amax(dim=1) - case.utilities.utility[:, 0]
    assert (regret >= 0).all()
    same = (case.utilities.ids.long() == own[:, None]).all(dim=2)
    assert torch.equal(case.utilities.first == 0, same)
    as_standard = case.utilities.utility[:, :1].expand_as(case.utilities.utility)
    assert torch.equal(case.utilities.utility[same], as_standard[same])


def test_weights_of_drawn_routes_sum_as_the_family_says(case, request):
    renormalise, scale = WEIGHTS[request.node.callspec.params["case"]]
    router, logits = case.model.routers[-1], case.standard.router_logits[-1]
    routes = draw_routes(router, logits, case.standard.keys, 0, OPTIONS, case.model.eligible_experts)
    probs = router.probabilities(logits)
    sums = routes.weights.sum(dim=2)
    chosen = probs[:, None].expand(-1, routes.ids.shape[1], -1).gather(2, routes.ids)
    assert torch.allclose(sums, torch.full_like(sums, scale) if renormalise else chosen.sum(2) * scale)
    assert (routes.ids.diff(dim=2) > 0).all(), "ascending, so no expert twice"


def test_routes_stay_within_the_experts_that_a_token_can_choose_among():
    """DeepSeek-V3 keeps 2 of 4 groups; a route outside of them is none that the model could take."""
    model = MoeModel(tiny_models.create("deepseek_v3"))
    logits = torch.randn(50, model.num_experts, generator=torch.Generator().manual_seed(0))
    router = model.routers[0]
    routes = draw_routes(router, logits, torch.arange(50), 1, DrawOptions(32, 64), model.eligible_experts)
    _, scores = selection_scores(router, logits)
    best = scores.view(50, 4, 4).topk(2).values.sum(2).topk(2).indices
    assert (routes.ids[..., None] // 4 == best[:, None, None]).any(dim=3).all()


# ---- the draws


def test_draws_follow_plackett_luce():
    """k = 2 of N = 4 without order, 100,000 times, against the law's own probabilities."""
    s = [0.5, 0.3, 0.15, 0.05]
    draws = 100_000
    noise = uniform_noise(torch.tensor([5]), 0, draws, torch.arange(4)[None])
    ranks = draw_ranks(torch.tensor([s]), noise, 2)[0].sort(dim=1).values
    counts = Counter(map(tuple, ranks.tolist()))
    expected = {
        (a, b): draws * (s[a] * s[b] / (1 - s[a]) + s[b] * s[a] / (1 - s[b]))
        for a, b in itertools.combinations(range(4), 2)
    }
    assert chisquare([counts[pair] for pair in expected], list(expected.values())).pvalue > 1e-3


def test_noise_at_its_ends_gives_finite_draws():
    smallest, largest = 0.5 / (1 << 52), ((1 << 52) - 0.5) / (1 << 52)
    assert smallest > 0 and largest < 1
    noise = torch.tensor([[[smallest, largest, 0.5, smallest]]], dtype=torch.float64)
    assert draw_ranks(torch.tensor([[0.25, 0.25, 0.25, 0.25]]), noise, 2)[0, 0].tolist() == [1, 2]
    assert (-(-noise.log()).log()).isfinite().all()


def test_a_typical_token_has_many_distinct_routes():
    router = Router(4, Scoring("softmax", True, correction_bias=torch.zeros(16)))
    logits = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    routes = draw_routes(router, logits, torch.arange(200), 0, DrawOptions(), 16)
    assert routes.distinct.sum(dim=1).double().mean() > 8
    assert routes.distinct[:, 0].all()


def test_a_draw_depends_on_token_layer_route_and_expert_alone():
    """Another batch, order, number of routes or pool changes no number of the noise."""
    keys, experts = torch.tensor([11, 22, 33]), torch.arange(6).expand(3, -1)
    noise = uniform_noise(keys, 2, 5, experts)
    assert torch.equal(uniform_noise(keys[[2, 0]], 2, 5, experts[:2]), noise[[2, 0]])
    assert torch.equal(uniform_noise(keys, 2, 3, experts), noise[:, :3])
    assert torch.equal(uniform_noise(keys, 2, 5, experts[:, [4, 1]]), noise[:, :, [4, 1]])
    others = (uniform_noise(keys + 1, 2, 5, experts), uniform_noise(keys, 3, 5, experts))
    assert all((other != noise).all() for other in others)
    assert len(noise.unique()) == noise.numel()


def test_another_order_of_the_text_changes_no_result():
    model, text = MoeModel(tiny_models.create("qwen3_moe")), text_of([9, 14, 5])
    order = [2, 0, 1]
    other = ScoredText("random", "0" * 64, *([getattr(text, n)[i] for i in order] for n in (
        "sequences", "positions", "documents")))  # fmt: skip
    results = []
    for each in (text, other):
        standard, inputs = read_standard(model, each, seed=1, nulls=2)
        assert inputs is not None
        utilities = last_layer_utilities(model, inputs, standard, OPTIONS)
        back = standard.document.argsort(stable=True)
        results.append((standard.targets[back], utilities.ids[back], utilities.utility[back]))
    assert torch.equal(results[0][0], results[1][0]), "null targets"
    assert torch.equal(results[0][1], results[1][1]), "routes"
    assert torch.allclose(results[0][2], results[1][2], atol=1e-4)


def test_the_seed_changes_routes_and_null_targets():
    model, text = MoeModel(tiny_models.create("qwen3_moe")), text_of([14])
    first, second = (read_standard(model, text, seed, nulls=4)[0] for seed in (1, 2))
    assert (first.keys != second.keys).all()
    assert not torch.equal(first.targets[:, 1:], second.targets[:, 1:])
    assert torch.equal(first.targets[:, 0], second.targets[:, 0])


def test_null_targets_follow_the_models_prediction():
    log_prob = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(20_000, -1)
    drawn = draw_targets(log_prob, torch.arange(20_000), 1)
    counts = torch.bincount(drawn.flatten(), minlength=4)
    assert counts[3] == 0
    assert chisquare(counts[:3], [10_000, 6_000, 4_000]).pvalue > 1e-3


# ---- best of the draws


def test_enough_draws_of_all_experts_find_the_best_of_all_routes():
    problem, _ = planted(40)
    rows = torch.arange(40)
    exhaustive = every_route(problem.router, problem.logits(problem.weight, rows), EXPERTS)
    assert exhaustive.ids.shape[1] == math.comb(EXPERTS, TOP_K)
    outputs, targets = problem.expert_outputs(rows, exhaustive.pool), problem.targets[:, None]
    best = route_utilities(problem.last, outputs, problem.residual, exhaustive, targets).amax(dim=1)
    _, sampled = problem.sampled(
        problem.weight, rows, DrawOptions(600, EXPERTS, temperature=50), problem.keys, targets
    )
    assert torch.allclose(sampled.amax(dim=1), best, atol=1e-6)
    assert (sampled.amax(dim=1) <= best + 1e-6).all()


def test_more_draws_contain_the_fewer():
    """So that the best of G draws never falls with G."""
    problem, _ = planted(30)
    rows, targets = torch.arange(30), problem.targets[:, None]
    few, many = (
        problem.sampled(problem.weight, rows, DrawOptions(n), problem.keys, targets)[1] for n in (4, 16)
    )
    assert torch.equal(many[:, :5], few)
    assert (many.amax(dim=1) >= few.amax(dim=1)).all()


def test_regret_finds_a_planted_misrouting_and_its_null_does_not():
    problem, classes = planted(2000)
    rows = torch.arange(2000)
    weights, ids = problem.router.route(problem.logits(problem.weight, rows))
    logits = problem.last.logits(problem.hidden(rows, ids.long(), weights))
    nulls = draw_targets(logits.log_softmax(dim=1), problem.keys, 1)
    targets = torch.cat([problem.targets[:, None], nulls], dim=1)
    routes, utility = problem.sampled(problem.weight, rows, DrawOptions(), problem.keys, targets)
    regret = utility.amax(dim=1) - utility[:, 0]
    misrouted = classes < PLANTED
    realised, null = regret[misrouted].mean(dim=0).tolist()
    assert realised > 0.5 and null < realised / 10
    assert (regret[~misrouted].mean(dim=0) < 0.1).all()
    best = routes.ids[rows, utility[:, :, 0].argmax(dim=1)]
    right = [(some[misrouted] == classes[misrouted, None]).any(1).double().mean() for some in (best, ids)]
    assert right[0] > 2 * right[1]
