"""What `additional_config["cor"]` means: one validated object, and the routing of each layer that follows."""

import dataclasses
import hashlib
import json
import os
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cor_vllm.errors import CorError, invalid, one_line
from cor_vllm.metadata import Mode, ServingInfo
from cor_vllm.scores import SWAP_RATE_LAMBDAS, Scores

Weights = Literal["router", "fused"]
WITHOUT_LAMBDA = ("layer", "random", "off")  # modes
STABLE_LAMBDA = (0.05, 0.2)  # the range that the paper calls stable


class ConfigError(CorError):
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

    # Strict: true is not a λ of 1, "0.1" is not a number, 3.0 is not a number of experts.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_by_name=True, allow_inf_nan=False
    )

    scores: str
    lambda_: float | None = Field(default=None, alias="lambda", ge=0)
    swap_rate: float | None = Field(default=None, gt=0, le=1)
    mode: Mode | None = None
    static_k: int | None = Field(default=None, ge=1)
    weights: Weights = "router"
    seed: int = Field(default=0, ge=0, lt=2**31)
    admin: bool = False  # POST /v1/cor may change λ and mode
    observe: bool = False  # count on the device what the routing does
    sha256: str | None = None

    @field_validator("scores", mode="before")
    @classmethod
    def _path(cls, value: object) -> object:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if value == "":  # which would be the working directory
            raise ValueError("the path is empty: give that of a scores file, or leave the option out")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "CorConfig":
        if self.lambda_ is not None and self.swap_rate is not None:
            raise ValueError("lambda and swap_rate both set λ: give one of them")
        biased = self.lambda_ is not None or self.swap_rate is not None
        if self.static_k is not None and (self.mode is not None or biased):
            raise ValueError("static_k routes by the model's own score: leave out mode, lambda and swap_rate")
        if self.mode == "random" and self.weights == "fused":
            raise ValueError("weights 'fused' take the score, which mode 'random' draws: use 'router'")
        if self.mode in WITHOUT_LAMBDA and biased:
            raise ValueError(f"mode {self.mode!r} has no λ: leave out lambda and swap_rate")
        if self.admin and (self.static_k is not None or self.mode == "random"):
            control = "static_k" if self.static_k is not None else "mode 'random'"
            raise ValueError(f"{control} has no λ or mode to change while serving: leave out admin")
        return self

    @classmethod
    def of(cls, options: Any) -> "CorConfig":
        """Validate `additional_config["cor"]`; ConfigError with one line where it is wrong."""
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            where, message, value = invalid(error)
            if not isinstance(options, dict) or "scores" not in options:
                raise ConfigError(
                    f"cor: {one_line(repr(options))}: must be an object with `scores`, the path of a scores "
                    "file (`cor-vllm calibrate` writes one)"
                ) from None
            got = f", got {value}" if where else ""
            raise ConfigError(f"{'.'.join(['cor', *where])}: {message}{got}") from None

    def resolved(self, serving: ServingInfo) -> "CorConfig":
        """These options with the mode and λ that the scores file adds where they have none.

        Raises:
            ConfigError: the file's mode contradicts an option.
        """
        if self.static_k is not None:
            return self
        mode = self.mode or serving.mode
        given = {**self.model_dump(by_alias=True), "mode": mode}
        if mode not in WITHOUT_LAMBDA and self.lambda_ is None and self.swap_rate is None:
            given["lambda"] = serving.lambda_
        return CorConfig.of(given)

    def changed(self, lambda_: float | None, mode: Mode | None) -> "CorConfig":
        """These options, resolved, with another λ or mode while the server runs; None stays as it is.

        A mode without λ keeps the λ before it, for the time when a mode with λ comes back.

        Raises:
            ConfigError: there is nothing that it could mean.
        """
        if not self.admin:
            raise ConfigError("this server was started without --cor-admin: its λ and mode are fixed")
        new = mode or self.mode
        if new == "random":
            raise ConfigError("mode 'random' cannot be entered while serving: restart with --cor-mode random")
        if lambda_ is None:
            return self.model_copy(update={"mode": new})
        if new in WITHOUT_LAMBDA:
            raise ConfigError(f"mode {new!r} has no λ: give mode 'full' or 'expert' with it")
        return self.model_copy(update={"mode": new, "lambda_": lambda_, "swap_rate": None})

    def routing_digest(self) -> str:
        """SHA-256 of everything in the resolved options that changes which experts a token gets."""
        routing = self.model_dump(exclude={"scores", "admin", "observe"})
        if self.mode in WITHOUT_LAMBDA:
            routing.update(lambda_=None, swap_rate=None)
        return hashlib.sha256(json.dumps(routing, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class LayerRouting:
    """How one MoE layer selects its experts."""

    layer_index: int
    top_k: int
    bias: torch.Tensor | None  # [N] float32, λ_l·CEI_l; None: the model's own score
    random: bool  # the score is drawn, for the paper's control
    lambda_: float = 0.0  # 0 where the mode has none

    @property
    def biased(self) -> bool:
        """Whether λ·CEI can change which experts this layer chooses."""
        return self.bias is not None and bool(self.bias.any())


def plan(config: CorConfig, scores: Scores) -> dict[int, LayerRouting]:
    """The routing of every MoE layer by its decoder layer number.

    Args:
        config: the serving options.
        scores: the scores file that they name.

    Returns:
        One LayerRouting per MoE layer of the file. With `admin` each has a bias, zeros where the mode has no
        λ: a captured graph adds the buffer that it was captured with, or none for ever.

    Raises:
        ConfigError: static_k exceeds the number of experts, or λ the range of float32.

    Source: method.md, "Online routing" and "Modes".
    """
    model, mode = scores.config.model, config.mode or scores.config.serving.mode
    if config.static_k is not None and config.static_k > model.num_experts:
        raise ConfigError(f"cor.static_k: {config.static_k}, the model has {model.num_experts} experts")
    lambdas = _lambdas(config, scores)
    layers = {}
    for row, layer_index in enumerate(scores.layer_index.tolist()):
        top_k, bias, lambda_ = model.top_k, None, 0.0
        if config.static_k is not None:
            top_k = config.static_k
        elif mode in ("full", "layer", "random"):
            top_k = int(scores.k[row])
        if config.static_k is None and mode in ("full", "expert"):
            lambda_ = lambdas[row]
            bias = _bias(scores.cei[row], lambda_, config.weights)
        if config.admin and bias is None:
            # vLLM builds models under their own default dtype; the routing step adds float32.
            bias = torch.zeros(model.num_experts, dtype=torch.float32)
        is_random = config.static_k is None and mode == "random"
        layers[layer_index] = LayerRouting(layer_index, top_k, bias, is_random, lambda_)
    return layers


def doubts(config: CorConfig, scores: Scores) -> list[str]:
    """One line for each thing that the options do and that is hardly meant.

    Args:
        config: the options, resolved.
        scores: the scores file that they name.
    """
    lines = []
    if scores.config.heldout and (harm := scores.config.heldout.harm(config.mode or "static k")):
        lines.append(harm)
    if config.static_k is not None or config.mode in WITHOUT_LAMBDA:
        return lines
    if config.swap_rate is not None:
        short = int((scores.swap_rate < config.swap_rate).all(dim=1).sum())
        if short:
            largest = f"λ = {SWAP_RATE_LAMBDAS[-1]:g}"
            lines.append(
                f"swap_rate {config.swap_rate:g} is more than {largest}, the largest measured, changes in "
                f"{short} of {scores.num_layers} layers: these are served with {largest}"
            )
    elif config.lambda_ is not None and config.lambda_ > STABLE_LAMBDA[1]:
        lines.append(_beyond_stable(config.lambda_, scores))
    return lines


def _beyond_stable(lambda_: float, scores: Scores) -> str:
    """How far λ·CEI takes the choice away from the router, whose probabilities differ by 1 at most."""
    line = "λ = {:g} is beyond the stable range, {:g} to {:g}".format(lambda_, *STABLE_LAMBDA)
    cei = scores.cei.double().sort(dim=1).values
    settled = torch.searchsorted(cei, cei - 1 / lambda_)  # [M, N], experts that each one is always ahead of
    if not settled.any():
        return line
    pairs = scores.num_layers * scores.num_experts * (scores.num_experts - 1) / 2
    return (
        f"{line}: in {int(settled.any(dim=1).sum())} of {scores.num_layers} layers experts differ in λ·CEI "
        "by more than 1, which is more than router probabilities can, and the order of "
        f"{settled.sum().item() / pairs:.0%} of all pairs of experts no longer depends on the router"
    )


def _bias(cei: torch.Tensor, lambda_: float, weights: Weights) -> torch.Tensor | None:
    cei = cei.double()
    if weights == "router":
        # A constant changes no order; taking it out keeps more bits for what does. Fused weights contain it.
        cei = cei - cei.min()
    bias = (lambda_ * cei).float()
    if not bias.isfinite().all():
        raise ConfigError(f"cor.lambda: {lambda_}, more than float32 holds; 0.05 to 0.2 is the stable range")
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
