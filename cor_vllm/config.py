"""What `additional_config["cor"]` means: one validated object, and the routing of each layer that follows."""

import dataclasses
import os
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cor_vllm.metadata import Mode
from cor_vllm.scores import SWAP_RATE_LAMBDAS, Scores

Weights = Literal["router", "fused"]


class ConfigError(ValueError):
    """Options that contradict each other or the scores file: one line with the option and the remedy."""


class CorOptions(dict[str, Any]):
    """`additional_config["cor"]` on its way to other processes: where it arrives, the plugin is installed.

    vLLM sends its configuration to the engine and the workers by pickle, but a process that does not load
    plugins (VLLM_PLUGINS) would take no notice of these options and serve the model's own routing.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (dict(self),)


def _arrive(options: dict[str, Any]) -> CorOptions:
    from cor_vllm import register

    if disabled():
        raise ConfigError(
            "COR_DISABLE is set in a worker but not where the engine was configured: set it in both or none"
        )
    register()
    return CorOptions(options)


def disabled() -> bool:
    """Whether COR_DISABLE switches the plugin off in this process."""
    return os.environ.get("COR_DISABLE", "") not in ("", "0")


class CorConfig(BaseModel):
    """The options of Counterfactual Routing at serving time (contract.md, "Serving").

    `lambda` and `mode` that are not given come from the scores file. `sha256` is filled in when the engine
    starts: it ties compile caches to the file's content and lets a worker notice a file that was replaced.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, allow_inf_nan=False)

    scores: str
    lambda_: float | None = Field(default=None, alias="lambda", ge=0)
    swap_rate: float | None = Field(default=None, gt=0, le=1)
    mode: Mode | None = None
    static_k: int | None = Field(default=None, ge=1)
    weights: Weights = "router"
    seed: int = Field(default=0, ge=0, lt=2**31)
    sha256: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "CorConfig":
        if self.lambda_ is not None and self.swap_rate is not None:
            raise ValueError("lambda and swap_rate both set λ: give one of them")
        biased = self.lambda_ is not None or self.swap_rate is not None
        if self.static_k is not None and (self.mode is not None or biased):
            raise ValueError("static_k routes by the model's own score: leave out mode, lambda and swap_rate")
        if self.mode == "random" and self.weights == "fused":
            raise ValueError("weights 'fused' take the score, which mode 'random' draws: use 'router'")
        if self.mode in ("layer", "random", "off") and biased:
            raise ValueError(f"mode {self.mode!r} has no λ: leave out lambda and swap_rate")
        return self

    @classmethod
    def of(cls, options: Any) -> "CorConfig":
        """Validate `additional_config["cor"]`; ConfigError with one line where it is wrong."""
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(["cor", *map(str, first["loc"])])
            value = f", got {first['input']!r}" if first["loc"] else ""
            raise ConfigError(f"{name}: {first['msg'].removeprefix('Value error, ')}{value}") from None


@dataclasses.dataclass(frozen=True)
class LayerRouting:
    """How one MoE layer selects its experts."""

    layer_index: int
    top_k: int
    bias: torch.Tensor | None  # [N] float32, λ_l·CEI_l; None: the model's own score
    random: bool  # the score is drawn, for the paper's control


def plan(config: CorConfig, scores: Scores) -> dict[int, LayerRouting]:
    """The routing of every MoE layer by its decoder layer number.

    Args:
        config: the serving options.
        scores: the scores file that they name.

    Returns:
        One LayerRouting per MoE layer of the file.

    Raises:
        ConfigError: static_k exceeds the number of experts.

    Source: method.md, "Online routing" and "Modes".
    """
    model, mode = scores.config.model, config.mode or scores.config.serving.mode
    if config.static_k is not None and config.static_k > model.num_experts:
        raise ConfigError(f"cor.static_k: {config.static_k}, the model has {model.num_experts} experts")
    lambdas = _lambdas(config, scores)
    layers = {}
    for row, layer_index in enumerate(scores.layer_index.tolist()):
        top_k, bias = model.top_k, None
        if config.static_k is not None:
            top_k = config.static_k
        elif mode in ("full", "layer", "random"):
            top_k = int(scores.k[row])
        if config.static_k is None and mode in ("full", "expert"):
            bias = _bias(scores.cei[row], lambdas[row], config.weights)
        is_random = config.static_k is None and mode == "random"
        layers[layer_index] = LayerRouting(layer_index, top_k, bias, is_random)
    return layers


def _bias(cei: torch.Tensor, lambda_: float, weights: Weights) -> torch.Tensor | None:
    cei = cei.double()
    if weights == "router":
        # A constant changes no order; taking it out keeps more bits for what does. Fused weights contain it.
        cei = cei - cei.min()
    bias = (lambda_ * cei).float()
    return bias if bias.any() else None


def _lambdas(config: CorConfig, scores: Scores) -> list[float]:
    if config.swap_rate is None:
        lambda_ = config.lambda_ if config.lambda_ is not None else scores.config.serving.lambda_
        return [lambda_] * scores.num_layers
    return [_lambda_for(config.swap_rate, rates) for rates in scores.swap_rate.tolist()]


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
