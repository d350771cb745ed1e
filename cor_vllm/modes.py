"""What a routing mode means: the one place where options and scores become the routing of a layer.

The server, the held-out check of the calibration, the evaluation and the tuning ask here. A mode is a row of
MODES: with a new row, `--cor-mode`, the held-out check and the conditions of the evaluation know it. Only the
verifier (verify/judge.py) has to be taught it as well, since it computes what it expects by itself.

Source: paper Eq. 9 for the score and Eq. 8 for k_l; docs/reference/method.md, "Modes".
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from cor_vllm.errors import CorError

Weights = Literal["router", "fused"]
SWAP_RATE_LAMBDAS = (0.01, 0.02, 0.05, 0.1, 0.2)  # at these λ a calibration measures how many slots change


class ConfigError(CorError):
    """Options that contradict each other or the scores file: one line with the option and the remedy."""


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to select experts."""

    description: str
    uses_budget: bool = False  # each layer selects its own k_l; otherwise all select the model's own top_k
    # (CEI of a layer [N] float64, λ) → what is added to the router's probabilities [N]; None: nothing is
    bias: Callable[[torch.Tensor, float], torch.Tensor] | None = None
    random: bool = False  # the score is drawn at random, as a control

    @property
    def has_lambda(self) -> bool:
        """Whether λ means anything in this mode."""
        return self.bias is not None

    @property
    def is_stock(self) -> bool:
        """Whether this is the model's own routing."""
        return not (self.uses_budget or self.has_lambda or self.random)


def causal_score(cei: torch.Tensor, lambda_: float) -> torch.Tensor:
    """λ·CEI, what Eq. 9 adds to the router's probability."""
    return lambda_ * cei


MODES = {
    "full": Mode("k_l and λ·CEI: the paper's method", uses_budget=True, bias=causal_score),
    "layer": Mode("k_l alone", uses_budget=True),
    "expert": Mode("λ·CEI alone", bias=causal_score),
    "random": Mode("experts drawn at random, k_l from the file", uses_budget=True, random=True),
    "off": Mode("stock routing through the plugin"),
}


def by_size() -> list[str]:
    """All modes, from stock routing to the whole method; those that draw their score come last."""

    def size(name: str) -> tuple[bool, int]:
        mode = MODES[name]
        return mode.random, mode.uses_budget + mode.has_lambda

    return sorted(MODES, key=size)


def _known(name: Any) -> Any:
    if not isinstance(name, str) or name not in MODES:
        *names, last = map(repr, MODES)
        raise PydanticCustomError("mode", "Input should be {}".format(f"{', '.join(names)} or {last}"))
    return name


ModeName = Annotated[str, BeforeValidator(_known), WithJsonSchema({"type": "string", "enum": list(MODES)})]
"""The name of a row of MODES, for pydantic."""


def has_lambda(mode: str | None) -> bool:
    """Whether λ means anything in this mode; None stands for static k, which has none."""
    return mode in MODES and MODES[mode].has_lambda


@dataclasses.dataclass(frozen=True)
class Setting:
    """How to route, as far as it does not depend on the layer."""

    mode: str | None = None  # a name of MODES; None: `static_k`
    lambda_: float = 0.0
    swap_rate: float | None = None  # a λ for each layer, so that it changes this share of slots
    static_k: int | None = None  # so many experts in every layer by the model's own score
    weights: Weights = "router"  # what weighs the selected experts
    seed: int = 0  # of a mode whose score is drawn


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """What a calibration says of the layers; M MoE layers, N routed experts."""

    layer_index: Sequence[int]  # [M], decoder layer numbers
    top_k: int  # the model's own
    k: Sequence[int]  # [M], k_l
    cei: torch.Tensor  # [M, N] float32, normalised to [0, 1]
    swap_rate: torch.Tensor | None = None  # [M, 5], share of slots changed at SWAP_RATE_LAMBDAS


@dataclasses.dataclass(frozen=True, eq=False)
class LayerRouting:
    """How one MoE layer selects its experts."""

    layer_index: int
    top_k: int
    bias: torch.Tensor | None = None  # [N] float32, added to the probabilities; None: the model's own score
    random: bool = False  # the score is drawn
    lambda_: float = 0.0  # 0 in a mode that has none
    fused: bool = False  # the score, renormalised, weighs the experts in place of the router's probability
    seed: int = 0  # of the draw; another one in every layer

    @property
    def biased(self) -> bool:
        """Whether the bias can change which experts this layer chooses."""
        return self.bias is not None and bool(self.bias.any())


def plan(setting: Setting, tables: Tables) -> list[LayerRouting]:
    """The routing of every MoE layer.

    Args:
        setting: how to route.
        tables: of the model's layers; `swap_rate` is needed only if the setting has one.

    Returns:
        One LayerRouting for each MoE layer, in order.

    Raises:
        ConfigError: static_k exceeds the number of experts, or λ the range of float32.
    """
    experts = tables.cei.shape[1]
    if setting.static_k is not None and setting.static_k > experts:
        raise ConfigError(f"cor.static_k: {setting.static_k}, the model has {experts} experts")
    mode = Mode("static k") if setting.static_k is not None else MODES[setting.mode or "off"]
    layers = []
    for row, layer_index in enumerate(tables.layer_index):
        lambda_ = _lambda_of(setting, tables, row) if mode.has_lambda else 0.0
        own_k = tables.top_k if setting.static_k is None else setting.static_k
        layers.append(
            LayerRouting(
                layer_index,
                top_k=tables.k[row] if mode.uses_budget else own_k,
                bias=_bias(mode, tables.cei[row], lambda_, setting.weights),
                random=mode.random,
                lambda_=lambda_,
                fused=setting.weights == "fused",
                seed=setting.seed + layer_index,
            )
        )
    return layers


def _bias(mode: Mode, cei: torch.Tensor, lambda_: float, weights: Weights) -> torch.Tensor | None:
    if mode.bias is None:
        return None
    cei = cei.double()
    if weights == "fused":  # the bias is part of the weights
        bias = mode.bias(cei, lambda_)
    else:  # a constant changes no order, and without it more bits are left for what does
        bias = mode.bias(cei - cei.min(), lambda_)
        bias = bias - bias.min()
    bias = bias.float()
    if not bias.isfinite().all():
        raise ConfigError(f"cor.lambda: {lambda_}, more than float32 holds; 0.05 to 0.2 is the stable range")
    return bias if bias.any() else None


def _lambda_of(setting: Setting, tables: Tables, row: int) -> float:
    if setting.swap_rate is None:
        return setting.lambda_
    assert tables.swap_rate is not None, "a scores file has it"
    return _lambda_for(setting.swap_rate, tables.swap_rate[row].tolist())


def _lambda_for(target: float, rates: list[float]) -> float:
    """The λ that changes the share `target` of a layer's slots, linear between the measured points.

    Beyond the largest measured λ nothing is known, so that one is the limit.
    """
    lower_lambda, lower_rate = 0.0, 0.0
    for lambda_, rate in zip(SWAP_RATE_LAMBDAS, rates, strict=True):
        if rate >= target:
            share = (target - lower_rate) / (rate - lower_rate)
            return lower_lambda + share * (lambda_ - lower_lambda)
        lower_lambda, lower_rate = lambda_, max(rate, lower_rate)
    return SWAP_RATE_LAMBDAS[-1]
