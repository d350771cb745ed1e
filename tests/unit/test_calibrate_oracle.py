"""The calibrator against a second computation that shares none of its code.

The second computation routes token by token in float64 Python, straight from Eq. 5, by replacing the routers'
`forward`; it runs one whole, unpadded sequence at a time and reads losses off the full logits.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from cor_vllm.calibrate.config import CalibrationOptions
from cor_vllm.calibrate.interventions.measurement import baseline
from cor_vllm.calibrate.interventions.plain import PlainAlgorithm
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.text.stratify import Strata, stratify
from cor_vllm.testing import tiny_models

TOLERANCE = 1e-5  # nats, float32
# Which families divide the weights by their sum, and by what they multiply them: written down a second time.
WEIGHTS = {
    "qwen3_moe": (True, 1.0),
    "qwen2_moe": (False, 1.0),
    "olmoe": (False, 1.0),
    "mixtral": (True, 1.0),
    "deepseek_v2": (False, 1.5),
    "deepseek_v3": (True, 2.5),
    "glm4_moe": (True, 1.5),
    "gpt_oss": (True, 1.0),
    "glm4_moe, sums as they are": (False, 1.5),
}
CASES: dict[str, dict[str, Any]] = {name: {} for name in tiny_models.FAMILIES} | {
    "glm4_moe, sums as they are": {"norm_topk_prob": False}
}
SIGMOID = ("deepseek_v3", "glm4_moe")
GROUPS = {"deepseek_v3": (4, 2)}  # how many there are, how many are kept
MOE_LAYERS = {name: [0, 1, 2] for name in tiny_models.FAMILIES}
MOE_LAYERS |= {"qwen2_moe": [0, 2], "deepseek_v2": [1, 2], "deepseek_v3": [1, 2], "glm4_moe": [1, 2]}

Choose = Callable[[list[float], int], tuple[list[int], list[float]]]
"""(g of one token, its position) → (ids, weights before renormalisation and scale)."""


@pytest.fixture(scope="module", params=CASES)
def family(request: pytest.FixtureRequest) -> "Family":
    return Family(request.param)


class Family:
    """One tiny model with short sequences of unequal length, seen by both computations."""

    def __init__(self, case: str) -> None:
        self.name = case.split(",")[0]
        self.weights = WEIGHTS[case]
        self.raw = tiny_models.create(self.name, **CASES[case])
        self.model = MoeModel(self.raw)
        generator = torch.Generator().manual_seed(3)
        self.sequences = [
            torch.randint(0, tiny_models.VOCAB, (length,), generator=generator).tolist()
            for length in (13, 19, 7)
        ]
        self.base = baseline(self.model, self.sequences)
        self.strata: Strata = stratify(self.base.losses, 88, 20)  # unequal counts, so that no mix-up fits
        places = [(s, t) for s, ids in enumerate(self.sequences) for t in range(len(ids) - 1)]
        self.hard = [place for place, hard in zip(places, self.strata.hard.tolist(), strict=True) if hard]
        self.easy = [place for place, easy in zip(places, self.strata.easy.tolist(), strict=True) if easy]
        self.stock = [second_losses(self.raw, ids) for ids in self.sequences]
        self.top_k = self.raw.config.num_experts_per_tok

    def measure(self, layer: int, **options: Any) -> Any:
        chosen = CalibrationOptions(model="m", output="o", **options)  # type: ignore[arg-type]
        return PlainAlgorithm(self.model, chosen, self.sequences, self.base, self.strata).measure(layer)

    def router(self, layer: int) -> Any:
        block = self.raw.model.layers[MOE_LAYERS[self.name][layer]].mlp
        return block.router if self.name == "gpt_oss" else block.gate

    def correction(self, layer: int) -> list[float]:
        """What the choice of experts adds to g: [N]."""
        router = self.router(layer)
        bias: list[float] = (
            router.e_score_correction_bias.tolist() if self.sigmoid else [0.0] * len(router.weight)
        )
        return bias

    @property
    def sigmoid(self) -> bool:
        return self.name in SIGMOID


def second_losses(raw: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = raw(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return -logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]


@contextmanager
def routed(family: Family, layer: int, choose: Choose) -> Iterator[None]:
    """Route one layer token by token through `choose`."""
    router = family.router(layer)
    renormalise, scale = family.weights

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden.reshape(-1, hidden.shape[-1]).double() @ router.weight.double().T
        if family.name == "gpt_oss":
            logits = logits + router.bias.double()
        rows = []
        probs = 1 / (1 + (-logits).exp()) if family.sigmoid else logits.softmax(-1)
        for position, g in enumerate(probs.tolist()):
            ids, weights = choose(g, position)
            total = sum(weights)
            if renormalise and total > 0:
                weights = [weight / total for weight in weights]
            rows.append((ids, [weight * scale for weight in weights]))
        width = max(len(ids) for ids, _ in rows)
        ids_ = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        weights_ = torch.tensor([weights + [0.0] * (width - len(weights)) for _, weights in rows])
        return logits.float(), weights_, ids_

    router.forward = forward
    try:
        yield
    finally:
        del router.forward


def best(family: Family, layer: int, g: list[float], k: int, gone: int | None = None) -> list[int]:
    """The k experts of highest g + correction, in the groups whose two best have the highest sums."""
    score = [p + c for p, c in zip(g, family.correction(layer), strict=True)]
    if gone is not None:
        score[gone] = -math.inf
    groups, kept = GROUPS.get(family.name, (1, 1))
    members = [range(j, j + len(g) // groups) for j in range(0, len(g), len(g) // groups)]
    strength = [sum(sorted(score[i] for i in group)[-2:]) for group in members]
    strongest = sorted(range(groups), key=lambda j: (-strength[j], j))[:kept]
    return sorted((i for j in strongest for i in members[j]), key=lambda i: (-score[i], i))[:k]


def stock_choice(
    family: Family, layer: int, g: list[float], k: int | None = None
) -> tuple[list[int], list[float]]:
    ids = best(family, layer, g, k or family.top_k)
    return ids, [g[i] for i in ids]


def taken_away(family: Family, layer: int, ablation: str, expert: int, only: int | None) -> Choose:
    """Eq. 5, by its letter: g̃_e = 0, g̃_i = g_i / (1 − g_e); for a sigmoid e leaves and g_i stays."""

    def choose(g: list[float], position: int) -> tuple[list[int], list[float]]:
        ids, weights = stock_choice(family, layer, g)
        if only is not None and position != only:
            return ids, weights
        rest = 1.0 if family.sigmoid else 1 - g[expert]
        reduced = [0.0 if i == expert else g[i] / rest for i in range(len(g))]
        if ablation == "backfill":
            ids = best(family, layer, reduced, family.top_k, gone=expert)
        elif expert not in ids:
            return ids, weights
        elif family.sigmoid:  # e's weight goes to the others, in proportion
            reduced = [value * sum(weights) / sum(reduced[i] for i in ids) for value in reduced]
        return ids, [reduced[i] for i in ids]

    return choose


def active_experts(family: Family, layer: int) -> list[list[int]]:
    """Top-k ids at every hard position, seen through the second routing."""
    seen: dict[tuple[int, int], list[int]] = {}
    for s, ids in enumerate(family.sequences):

        def choose(g: list[float], position: int, s: int = s) -> tuple[list[int], list[float]]:
            chosen = stock_choice(family, layer, g)
            seen[s, position] = chosen[0]
            return chosen

        with routed(family, layer, choose):
            second_losses(family.raw, ids)
    return [seen[place] for place in family.hard]


@pytest.mark.parametrize("name", SIGMOID)
def test_the_correction_bias_and_the_groups_change_the_choice(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the comparisons below would not see them."""
    family = Family(name)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randn(200, len(family.correction(0)), generator=generator).sigmoid().tolist()
    chosen = [best(family, 0, g, family.top_k) for g in tokens]
    if name in GROUPS:
        monkeypatch.delitem(GROUPS, name)
        assert (
            sum(best(family, 0, g, family.top_k) != ids for g, ids in zip(tokens, chosen, strict=True)) > 50
        )
        monkeypatch.undo()
    family.router(0).e_score_correction_bias.zero_()
    assert sum(best(family, 0, g, family.top_k) != ids for g, ids in zip(tokens, chosen, strict=True)) > 50


def test_second_computation_reproduces_the_model(family: Family) -> None:
    for layer in range(len(MOE_LAYERS[family.name])):
        with routed(family, layer, lambda g, position, layer=layer: stock_choice(family, layer, g)):
            for ids, stock in zip(family.sequences, family.stock, strict=True):
                assert (second_losses(family.raw, ids) - stock).abs().max() < TOLERANCE


def test_baseline(family: Family) -> None:
    assert family.model.layer_index == MOE_LAYERS[family.name]
    assert (family.base.losses.double() - torch.cat(family.stock)).abs().max() < TOLERANCE


@pytest.mark.parametrize("ablation", ["backfill", "drop"])
@pytest.mark.parametrize("scope", ["token", "sequence"])
def test_ablations(family: Family, ablation: str, scope: str) -> None:
    moved = 0.0
    for layer in range(len(MOE_LAYERS[family.name])):
        measured = family.measure(layer, ablation=ablation, scope=scope)
        assert measured.active.tolist() == active_experts(family, layer)
        for row, (s, t) in enumerate(family.hard):
            for slot, expert in enumerate(measured.active[row].tolist()):
                only = t if scope == "token" else None
                with routed(family, layer, taken_away(family, layer, ablation, expert, only)):
                    change = second_losses(family.raw, family.sequences[s])[t] - family.stock[s][t]
                assert measured.ablation[row, slot] == pytest.approx(change.item(), abs=TOLERANCE)
                moved = max(moved, abs(change.item()))
    assert moved > 0.1, "these interventions must matter, or the comparison shows nothing"


@pytest.mark.parametrize("target", ["moe", "layer"])
@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_sensitivities(family: Family, target: str, scope: str) -> None:
    delta, moved = 0.3, 0.0
    for layer in range(len(MOE_LAYERS[family.name])):
        measured = family.measure(layer, perturb_target=target, perturb_scope=scope, delta=delta)
        for places, values in ((family.hard, measured.hard), (family.easy, measured.easy)):
            assert len(places) == len(values)
            for (s, t), value in zip(places, values.tolist(), strict=True):
                with scaled(family, layer, target, delta, t if scope == "token" else None):
                    change = second_losses(family.raw, family.sequences[s])[t] - family.stock[s][t]
                assert value == pytest.approx(change.item(), abs=TOLERANCE)
                moved = max(moved, abs(change.item()))
    assert moved > 0.02


@contextmanager
def scaled(family: Family, layer: int, target: str, delta: float, only: int | None) -> Iterator[None]:
    decoder = family.raw.model.layers[MOE_LAYERS[family.name][layer]]
    module = decoder.mlp if target == "moe" else decoder
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        for position in range(hidden.shape[1]) if only is None else [only]:
            hidden[0, position] *= 1 + delta
        return output

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def test_marginal(family: Family) -> None:
    moved = 0.0
    for layer in range(len(MOE_LAYERS[family.name])):
        measured = family.measure(layer, intensity="marginal")
        for k, values in ((family.top_k - 1, measured.fewer), (family.top_k + 1, measured.more)):
            for row, (s, t) in enumerate(family.hard):

                def choose(g: list[float], at: int, layer: int = layer, k: int = k, t: int = t) -> Any:
                    return stock_choice(family, layer, g, k if at == t else None)

                with routed(family, layer, choose):
                    change = second_losses(family.raw, family.sequences[s])[t] - family.stock[s][t]
                assert values[row] == pytest.approx(change.item(), abs=TOLERANCE)
                moved = max(moved, abs(change.item()))
    assert moved > 0.1


def test_marginal_is_measured_only_where_asked_for(family: Family) -> None:
    measured = family.measure(0, intensity="ratio")
    assert measured.fewer is None and measured.more is None
