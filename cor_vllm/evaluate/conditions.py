"""The conditions of the table: each is a scores file, perhaps changed, and serving options."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.modes import MODES, by_size, has_lambda
from cor_vllm.scores import SWAP_RATE_LAMBDAS, Scores

Gate = Literal["router", "output"]
STANDARD, AGAIN = "standard", "standard-again"
PERMUTATIONS = 3  # by default
SWAP_RATES = (0.05, 0.15)


@dataclass(frozen=True)
class Condition:
    """One row of the table."""

    name: str
    description: str
    options: dict[str, Any] | None = None  # `additional_config["cor"]` less `scores`; None: no plugin at all
    change: Callable[[Scores], Scores] | None = None  # what is done to the scores first
    source: str = ""  # which scores file; "" is --cor-scores
    # The rest only exists on the transformers side.
    gate: Gate | None = None  # the bias only where this is uncertain
    dola: bool = False
    iti: bool = False

    @property
    def transformers_only(self) -> bool:
        """Whether a server cannot do it."""
        return self.gate is not None or self.dola or self.iti


@dataclass(frozen=True)
class Sources:
    """The scores files: the main one under "", others by the name given with --also."""

    scores: dict[str, Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class Permuted:
    """CEI with its experts shuffled within each layer: the same values, saying nothing about any expert."""

    seed: int

    def __call__(self, scores: Scores) -> Scores:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.stack(
            [torch.randperm(scores.num_experts, generator=generator) for _ in range(scores.num_layers)]
        )
        return dataclasses.replace(scores, cei=scores.cei.gather(1, order))


@dataclass(frozen=True)
class RandomBias:
    """Normal noise in place of CEI, with CEI's norm in each layer after taking out the mean.

    A scores file holds CEI in [0, 1]; noise that does not fit is brought into the range, all layers alike,
    and λ has to make up for it.
    """

    seed: int

    def __call__(self, scores: Scores) -> Scores:
        noise = _noise(scores, self.seed)
        return dataclasses.replace(scores, cei=(noise / self.scale(scores)).clamp(0, 1))

    def scale(self, scores: Scores) -> float:
        """What λ is to be multiplied by; at least 1."""
        return max(1.0, _noise(scores, self.seed).max().item())


def _noise(scores: Scores, seed: int) -> torch.Tensor:
    noise = torch.randn(scores.cei.shape, generator=torch.Generator().manual_seed(seed))
    centred = noise - noise.mean(dim=1, keepdim=True)
    wanted = (scores.cei - scores.cei.mean(dim=1, keepdim=True)).norm(dim=1, keepdim=True)
    scaled = centred * wanted / centred.norm(dim=1, keepdim=True)
    return scaled - scaled.min(dim=1, keepdim=True).values


def modes(biased: dict[str, Any]) -> list[Condition]:
    """The conditions that are defined without a scores file at hand.

    Args:
        biased: how λ is set; empty: by the file that a server has.
    """
    return [
        Condition(STANDARD, "the model's own routing, no plugin"),
        Condition(AGAIN, "the same once more: the noise of the measurement itself"),
        *(
            Condition(name, MODES[name].description, {"mode": name, **(biased if has_lambda(name) else {})})
            for name in sorted(by_size(), key=lambda name: not MODES[name].random)
        ),
        Condition(
            "full-fused", "full, weights from the score", {"mode": "full", "weights": "fused", **biased}
        ),
    ]


# What the names of the other conditions look like; a server's own name must not.
DEFINED_BY_A_FILE = ("static-*", "expert-lambda*", "expert-swap*", "*-permuted*", "random-bias", "*@*")
NOT_ON_A_SERVER = ("gate-router", "gate-output", "dola", "iti", "full-dola")


def table(sources: Sources, lam: float, permutations: int = PERMUTATIONS) -> list[Condition]:
    """Every condition, in the order of the table.

    Args:
        sources: the scores files.
        lam: λ where a condition does not set its own.
        permutations: of the CEI of each file.
    """
    main = sources.scores[""]
    biased = {"lambda": lam}
    rows = modes(biased)
    for seed in range(permutations):
        rows.append(
            Condition(
                f"expert-permuted-{seed}",
                "expert with CEI permuted within layers",
                {"mode": "expert", **biased},
                Permuted(seed),
            )
        )
    rows.append(Condition("full-permuted", "full with CEI permuted", {"mode": "full", **biased}, Permuted(0)))
    noise = RandomBias(0)
    scaled = {"mode": "expert", "lambda": lam * noise.scale(main)}
    rows.append(Condition("random-bias", "normal noise of CEI's norm as the bias", scaled, noise))
    rows += _static(main)
    rows += [
        Condition(f"expert-lambda{value}", f"expert at λ = {value}", {"mode": "expert", "lambda": value})
        for value in SWAP_RATE_LAMBDAS
        if value != lam
    ]
    for rate in SWAP_RATES:
        options = {"mode": "expert", "swap_rate": rate}
        rows.append(
            Condition(f"expert-swap{rate}", f"a λ per layer that changes {rate:.0%} of slots", options)
        )
        rows.append(Condition(f"expert-swap{rate}-permuted", "that with CEI permuted", options, Permuted(0)))
    rows += [
        Condition("gate-router", "expert where the router is uncertain", {"mode": "expert", **biased},
                  gate="router"),
        Condition("gate-output", "expert where the output is uncertain", {"mode": "expert", **biased},
                  gate="output"),
        Condition("dola", "DoLa", dola=True),
        Condition("iti", "ITI", iti=True),
        Condition("full-dola", "full and DoLa", {"mode": "full", **biased}, dola=True),
    ]  # fmt: skip
    for source in filter(None, sources.scores):
        rows += _from(source, biased, permutations)
    return rows


def _static(scores: Scores) -> list[Condition]:
    top_k = scores.config.model.top_k
    return [
        Condition(f"static-{k}", f"k = {k} in every layer", {"static_k": k})
        for k in range(top_k + 1, min(top_k + 4, scores.num_experts) + 1)
    ]


def _from(source: str, biased: dict[str, Any], permutations: int) -> list[Condition]:
    """The rows of a further scores file; its permutations are what it has to beat."""
    swap = {"mode": "expert", "swap_rate": SWAP_RATES[0]}
    return [
        Condition(f"layer@{source}", f"k_l of {source}", {"mode": "layer"}, source=source),
        Condition(f"expert@{source}", f"λ·CEI of {source}", {"mode": "expert", **biased}, source=source),
        Condition(f"full@{source}", f"both of {source}", {"mode": "full", **biased}, source=source),
        Condition(f"expert-swap@{source}", f"CEI of {source} at {SWAP_RATES[0]:.0%} of slots", swap,
                  source=source),
        *(
            Condition(f"expert-permuted-{seed}@{source}", f"CEI of {source}, permuted",
                      {"mode": "expert", **biased}, Permuted(seed), source)
            for seed in range(permutations)
        ),
    ]  # fmt: skip


GROUPS = {
    "quick": (STANDARD, AGAIN, "full", "expert", "full-permuted"),
    "paper": (
        STANDARD, AGAIN, "random", "layer", "expert", "full", "full-permuted", "random-bias",
        "static-*", "dola", "iti", "full-dola",
    ),
}  # fmt: skip


def select(rows: Sequence[Condition], wanted: Sequence[str]) -> list[Condition]:
    """The rows named by name, by a pattern with `*`, by group, or `all`; standard is always in.

    Raises:
        EvaluationError: a name that is none of these.
    """
    names = list(itertools.chain.from_iterable(GROUPS.get(name, (name,)) for name in wanted))
    chosen = {STANDARD}
    for name in names:
        found = {row.name for row in rows if name == "all" or fnmatchcase(row.name, name)}
        if not found:
            known = ", ".join(["all", *GROUPS, *(row.name for row in rows)])
            raise EvaluationError(f"--conditions {name}: unknown; known are {known}")
        chosen |= found
    return [row for row in rows if row.name in chosen]
