"""The conditions of the table: each is a scores file, perhaps changed, serving options, and a router."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from cor_vllm.evaluate import acts
from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.modes import MODES, by_size, has_lambda
from cor_vllm.scores import SWAP_RATE_LAMBDAS, Scores

STANDARD, AGAIN = "standard", "standard-again"
ROUTER, ROUTER_RANDOM = "router", "router-random"
PERMUTATIONS, ROUTER_DRAWS = 3, 3  # by default
SWAP_RATES = (0.05, 0.15)

Sources = dict[str, Scores]
"""The scores files: the main one under "", others by the name given with --also."""


@dataclass(frozen=True)
class Rerouted:
    """The router of --cor-router in place of the model's own, or a random one that is as far from that."""

    seed: int | None = None  # of the random one; None: the router of the file


@dataclass(frozen=True)
class Condition:
    """One row of the table: what it does, and what it is to other rows."""

    name: str
    description: str
    options: dict[str, Any] | None = None  # `additional_config["cor"]` less `scores`; None: no plugin at all
    change: Callable[[Scores], Scores] | None = None  # what is done to the scores first
    source: str = ""  # which scores file; "" is --cor-scores
    act: acts.Act = acts.routing  # what is done to a model of transformers; a server can only route
    router: Rerouted | None = None  # what takes the place of one layer's router; None: the model's own
    control_of: str | None = None  # the row that this one is with CEI permuted, or with a random router
    draw_of: str | None = None  # the name that rows share if only a draw differs; their mean has it
    static: bool = False  # as many experts in every layer, by the model's own score

    @property
    def transformers_only(self) -> bool:
        """Whether a server cannot do it."""
        return self.act is not acts.routing


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


def references() -> list[Condition]:
    """The conditions that others are compared with."""
    return [
        Condition(STANDARD, "the model's own routing, no plugin"),
        Condition(AGAIN, "the same once more: the noise of the measurement itself"),
    ]


def modes(biased: dict[str, Any]) -> list[Condition]:
    """The conditions that are defined without a scores file at hand.

    Args:
        biased: how λ is set; empty: by the file that a server has.
    """
    return [
        *references(),
        *(
            Condition(name, MODES[name].description, {"mode": name, **(biased if has_lambda(name) else {})})
            for name in sorted(by_size(), key=lambda name: not MODES[name].random)
        ),
        Condition(
            "full-fused", "full, weights from the score", {"mode": "full", "weights": "fused", **biased}
        ),
    ]


# What the names of rows look like that only a file defines, and the flag that names the file; a server's own
# name must not look so.
DEFINED_BY_A_FILE = {
    **dict.fromkeys(
        ("static-*", "expert-lambda*", "expert-swap*", "*-permuted*", "random-bias", "*@*"), "--cor-scores"
    ),
    **dict.fromkeys((ROUTER, f"{ROUTER_RANDOM}-*"), "--cor-router"),
}


def on_transformers(biased: dict[str, Any]) -> list[Condition]:
    """The conditions that no server can do.

    Args:
        biased: how λ is set.
    """
    expert, full = {"mode": "expert", **biased}, {"mode": "full", **biased}
    return [
        Condition("gate-router", "expert where the router is uncertain", expert, act=acts.router_gate),
        Condition("gate-output", "expert where the output is uncertain", expert, act=acts.output_gate),
        Condition("dola", "DoLa", act=acts.dola),
        Condition("iti", "ITI", act=acts.iti),
        Condition("full-dola", "full and DoLa", full, act=acts.dola),
    ]


def table(sources: Sources, lam: float, permutations: int = PERMUTATIONS) -> list[Condition]:
    """Every condition, in the order of the table.

    Args:
        sources: the scores files.
        lam: λ of the conditions that do not set their own.
        permutations: of the CEI of each file.
    """
    main = sources[""]
    biased = {"lambda": lam}
    noise = RandomBias(0)
    scaled = {"mode": "expert", "lambda": lam * noise.scale(main)}
    rows = [
        *modes(biased),
        *_permutations("", "expert with CEI permuted within layers", biased, permutations),
        _permuted("full", "full with CEI permuted", {"mode": "full", **biased}),
        Condition("random-bias", "normal noise of CEI's norm as the bias", scaled, noise),
        *_static(main),
        *(
            Condition(f"expert-lambda{value}", f"expert at λ = {value}", {"mode": "expert", "lambda": value})
            for value in SWAP_RATE_LAMBDAS
            if value != lam
        ),
    ]
    for rate in SWAP_RATES:
        name, options = f"expert-swap{rate}", {"mode": "expert", "swap_rate": rate}
        rows.append(Condition(name, f"a λ per layer that changes {rate:.0%} of slots", options))
        rows.append(_permuted(name, "that with CEI permuted", options))
    rows += on_transformers(biased)
    for source in filter(None, sources):
        rows += _from(source, biased, permutations)
    return rows


def router_rows(draws: int) -> list[Condition]:
    """The row of a router file, and its controls, over which a mean is taken.

    Args:
        draws: of random routers, each as far from the model's own as that of the file.
    """
    random = "a random change of the same router, as large as that of --cor-router"
    return [
        Condition(ROUTER, "the router of --cor-router", router=Rerouted()),
        *(
            Condition(
                f"{ROUTER_RANDOM}-{seed}", random, router=Rerouted(seed),
                control_of=ROUTER, draw_of=ROUTER_RANDOM,
            )
            for seed in range(draws)
        ),
    ]  # fmt: skip


def as_measured(rows: Iterable[Condition], sources: Sources) -> list[Condition]:
    """The rows of scores files next to a router file: each with the router that its scores are about.

    Args:
        rows: those of `table`.
        sources: the scores files; one that names a router overlay names that of the router file.
    """
    return [_as_measured(row, sources) for row in rows]


def _as_measured(row: Condition, sources: Sources) -> Condition:
    if row.name in (STANDARD, AGAIN):
        return row
    scores = sources[row.source]
    if row.options is None or scores.config.model.router_overlay is None:
        return dataclasses.replace(row, description=f"{row.description}; with the model's own router")
    description = f"{row.description}; with the router of --cor-router"
    return dataclasses.replace(row, description=description, router=Rerouted())


def _permuted(name: str, description: str, options: dict[str, Any]) -> Condition:
    """The one control of a row."""
    return Condition(f"{name}-permuted", description, options, Permuted(0), control_of=name)


def _permutations(
    source: str, description: str, biased: dict[str, Any], permutations: int
) -> list[Condition]:
    """The controls of `expert` with a scores file; a mean is taken over them."""
    at, family = (f"@{source}", f"@{_family(source)}") if source else ("", "")
    return [
        Condition(
            f"expert-permuted-{seed}{at}", description, {"mode": "expert", **biased}, Permuted(seed), source,
            control_of=f"expert{at}", draw_of=f"expert-permuted{family}",
        )
        for seed in range(permutations)
    ]  # fmt: skip


def _static(scores: Scores) -> list[Condition]:
    top_k = scores.config.model.top_k
    return [
        Condition(f"static-{k}", f"k = {k} in every layer", {"static_k": k}, static=True)
        for k in range(top_k + 1, min(top_k + 4, scores.num_experts) + 1)
    ]


def _family(source: str) -> str:
    """What several calibrations are draws of: `--also facts0=… --also facts1=…` are draws of `facts`."""
    return source.rstrip("0123456789") or source


def _from(source: str, biased: dict[str, Any], permutations: int) -> list[Condition]:
    """The rows of a further scores file; its permutations are what it has to beat."""
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("layer", f"k_l of {source}", {"mode": "layer"}),
        ("expert", f"λ·CEI of {source}", {"mode": "expert", **biased}),
        ("full", f"both of {source}", {"mode": "full", **biased}),
        (
            "expert-swap",
            f"CEI of {source} at {SWAP_RATES[0]:.0%} of slots",
            {"mode": "expert", "swap_rate": SWAP_RATES[0]},
        ),
    ]
    family = _family(source)
    return [
        *(
            Condition(f"{name}@{source}", description, options, source=source,
                      draw_of=f"{name}@{family}" if family != source else None)
            for name, description, options in rows
        ),
        *_permutations(source, f"CEI of {source}, permuted", biased, permutations),
    ]  # fmt: skip


GROUPS = {
    "quick": (STANDARD, AGAIN, "full", "expert", "full-permuted", ROUTER, f"{ROUTER_RANDOM}-*"),
    "paper": (
        STANDARD, AGAIN, "random", "layer", "expert", "full", "full-permuted", "random-bias",
        "static-*", "dola", "iti", "full-dola",
    ),
}  # fmt: skip


def select(rows: Sequence[Condition], wanted: Sequence[str]) -> list[Condition]:
    """The rows named by name, by a pattern with `*`, by group, or `all`; standard is always in.

    Of a group, those that the given files define.

    Raises:
        EvaluationError: a name that is none of these.
    """
    chosen = {STANDARD}
    for name in wanted:
        patterns = ("*",) if name == "all" else GROUPS.get(name, (name,))
        found = {row.name for row in rows if any(fnmatchcase(row.name, pattern) for pattern in patterns)}
        if not found:
            known = ", ".join(["all", *GROUPS, *(row.name for row in rows)])
            raise EvaluationError(f"--conditions {name}: unknown; known are {known}")
        chosen |= found
    return [row for row in rows if row.name in chosen]
