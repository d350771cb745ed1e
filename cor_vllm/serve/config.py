"""What `additional_config["cor"]` means: one validated object, and the routing of each layer that follows."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from cor_vllm import modes
from cor_vllm.errors import invalid, one_line
from cor_vllm.metadata import ServingInfo
from cor_vllm.modes import MODES, ConfigError, LayerRouting, ModeName, Setting, Weights, has_lambda
from cor_vllm.scores import SWAP_RATE_LAMBDAS, Scores

STABLE_LAMBDA = (0.05, 0.2)  # the range that the paper calls stable
_NOUNS = {"scores": "scores file", "router": "router file"}  # the options that are paths
_NEED_SCORES = ("lambda_", "swap_rate", "mode", "static_k", "weights", "seed", "observe")


class CorOptions(dict[str, Any]):
    """`additional_config["cor"]` on its way to other processes, where its arrival installs the plugin.

    vLLM sends its configuration to the engine and the workers by pickle, but a process that does not load
    plugins (VLLM_PLUGINS) would take no notice of these options and serve the model's own routing.
    """

    arrive: ClassVar[Callable[[dict[str, Any]], "CorOptions"]]  # plugin.arrive, set by plugin.install

    def __reduce__(self) -> tuple[Any, ...]:
        return CorOptions.arrive, (dict(self),)


def disabled() -> bool:
    """Whether COR_DISABLE switches the plugin off in this process."""
    return os.environ.get("COR_DISABLE", "") not in ("", "0")


class RoutingOptions(BaseModel):
    """The options that decide which experts a token gets, for a scores file that is at hand.

    `lambda` and `mode` that are not given come from the scores file.
    """

    # Strict: true is not a λ of 1, "0.1" is not a number, 3.0 is not a number of experts.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_by_name=True, allow_inf_nan=False
    )

    lambda_: float | None = Field(default=None, alias="lambda", ge=0)
    swap_rate: float | None = Field(default=None, gt=0, le=1)
    mode: ModeName | None = None
    static_k: int | None = Field(default=None, ge=1)
    weights: Weights = "router"
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.lambda_ is not None and self.swap_rate is not None:
            raise ValueError("lambda and swap_rate both set λ: give one of them")
        biased = self.lambda_ is not None or self.swap_rate is not None
        if self.static_k is not None and (self.mode is not None or biased):
            raise ValueError("static_k routes by the model's own score: leave out mode, lambda and swap_rate")
        if self.mode is not None and MODES[self.mode].random and self.weights == "fused":
            raise ValueError(f"weights 'fused' take the score, which mode {self.mode!r} draws: use 'router'")
        if self.mode is not None and not has_lambda(self.mode) and biased:
            raise ValueError(f"mode {self.mode!r} has no λ: leave out lambda and swap_rate")
        return self

    @classmethod
    def of(cls, options: Any) -> Self:
        """Validate options as a user gives them; ConfigError with one line if they are wrong."""
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            where, message, value = invalid(error)
            got = f", got {value}" if where else ""
            raise ConfigError(f"{'.'.join(['cor', *where])}: {message}{got}") from None

    def resolved(self, serving: ServingInfo) -> Self:
        """These options with the mode and λ that the scores file adds if they have none.

        Raises:
            ConfigError: the file's mode contradicts an option.
        """
        if self.static_k is not None:
            return self
        mode = self.mode or serving.mode
        given = {**self.model_dump(by_alias=True, exclude_none=True), "mode": mode}
        if has_lambda(mode) and self.lambda_ is None and self.swap_rate is None:
            given["lambda"] = serving.lambda_
        return self.of(given)

    def setting(self, serving: ServingInfo) -> Setting:
        """These options as modes.py takes them, with the mode and λ of the scores file if they have none."""
        return Setting(
            mode=None if self.static_k is not None else self.mode or serving.mode,
            lambda_=serving.lambda_ if self.lambda_ is None else self.lambda_,
            swap_rate=self.swap_rate,
            static_k=self.static_k,
            weights=self.weights,
            seed=self.seed,
        )


class CorConfig(RoutingOptions):
    """The options of Counterfactual Routing at serving time, `additional_config["cor"]`.

    `sha256` and `router_sha256` are filled in when the engine starts: they tie compile caches to the files'
    content and let a worker notice a file that was replaced.
    """

    scores: str | None = None
    router: str | None = None  # a router file, which replaces the router of one layer
    admin: bool = False  # POST /v1/cor may change λ and mode, and switch the router of the file
    observe: bool = False  # count on the device what the routing does
    sha256: str | None = None  # of the scores file
    router_sha256: str | None = None
    router_on: bool = True  # whether the router of the file is in force; changes while serving

    @field_validator("scores", "router", mode="before")
    @classmethod
    def _path(cls, value: object, info: ValidationInfo) -> object:
        if value is None:
            raise PydanticCustomError("string_type", "Input should be a valid string")
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if value == "":  # which would be the working directory
            raise ValueError(
                f"the path is empty: give that of a {_NOUNS[info.field_name or 'scores']}, or leave the "
                "option out"
            )
        return value

    @model_validator(mode="after")
    def _of_a_scores_file(self) -> Self:
        if self.scores is None:
            fields = type(self).model_fields
            given = [name for name in _NEED_SCORES if getattr(self, name) != fields[name].default]
            if given:
                names = ", ".join(fields[name].alias or name for name in given)
                raise ValueError(
                    f"{names}: only with scores, the path of a scores file: give it, or leave this out"
                )
        return self

    @model_validator(mode="after")
    def _changeable(self) -> Self:
        if self.admin and (self.static_k is not None or (self.mode is not None and MODES[self.mode].random)):
            control = "static_k" if self.static_k is not None else f"mode {self.mode!r}"
            raise ValueError(f"{control} has no λ or mode to change while serving: leave out admin")
        return self

    @classmethod
    def of(cls, options: Any) -> Self:
        """Validate `additional_config["cor"]`; ConfigError with one line if it is wrong."""
        if not isinstance(options, dict) or not options.keys() & _NOUNS.keys():
            raise ConfigError(
                f"cor: {one_line(repr(options))}: must be an object with `scores`, the path of a scores "
                "file (`cor-vllm calibrate` writes one)"
            )
        return super().of(options)

    def changed(self, lambda_: float | None, mode: str | None, router: bool | None = None) -> Self:
        """These options, resolved, with something else in force while the server runs; None stays as it is.

        A mode without λ keeps the λ before it, for the time when a mode with λ comes back.

        Args:
            lambda_: λ of all layers.
            mode: a name of MODES.
            router: whether the router of the router file is in force.

        Raises:
            ConfigError: there is nothing that it could mean.
        """
        if not self.admin:
            raise ConfigError(
                "this server was started without --cor-admin: what it routes by is fixed until it is "
                "restarted"
            )
        new = self
        if lambda_ is not None or mode is not None:
            new = self._with_routing(lambda_, mode)
        if router is not None:
            if self.router is None:
                raise ConfigError("this server has no router file: restart it with --cor-router FILE")
            new = new.model_copy(update={"router_on": router})
        new.check_together()
        return new

    def _with_routing(self, lambda_: float | None, mode: str | None) -> Self:
        if self.scores is None:
            raise ConfigError(
                "this server has no scores file, so it has no λ and no mode: restart it with --cor-scores"
            )
        new = mode or self.mode
        assert new is not None, "the options are resolved, and admin refuses static_k"
        if MODES[new].random:
            raise ConfigError(f"mode {new!r} cannot be entered while serving: restart with --cor-mode {new}")
        if lambda_ is None:
            return self.model_copy(update={"mode": new})
        if not has_lambda(new):
            others = " or ".join(repr(name) for name in MODES if has_lambda(name))
            raise ConfigError(f"mode {new!r} has no λ: give mode {others} with it")
        return self.model_copy(update={"mode": new, "lambda_": lambda_, "swap_rate": None})

    def check_together(self) -> None:
        """Refuse a scores file, measured under the router of the router file, without that router.

        Raises:
            ConfigError: the router is off, and the mode, which is resolved, uses the scores.
        """
        stock = self.mode is not None and MODES[self.mode].is_stock
        if self.scores is not None and self.router is not None and not (self.router_on or stock):
            raise ConfigError(
                "the scores were measured under the router of the router file, so the one is not served "
                "without the other: keep the router on, or give mode 'off' with it"
            )

    def routing_digest(self) -> str:
        """SHA-256 of all resolved options that change which experts a token gets, but for a router file."""
        routing = self.model_dump(exclude={"admin", "observe", *_NOUNS, "router_sha256", "router_on"})
        if self.mode is not None and not has_lambda(self.mode):
            routing.update(lambda_=None, swap_rate=None)
        return hashlib.sha256(json.dumps(routing, sort_keys=True).encode()).hexdigest()


def plan(config: RoutingOptions, scores: Scores) -> dict[int, LayerRouting]:
    """The routing of every MoE layer by its decoder layer number.

    Args:
        config: the serving options.
        scores: the scores file that they name.

    Returns:
        One LayerRouting for each MoE layer of the file (modes.plan). With `admin` each has a bias, zeros if
        the mode has no λ: a captured graph adds the buffer that it was captured with, and gets none later.

    Raises:
        ConfigError: static_k exceeds the number of experts, or λ the range of float32.
    """
    layers = modes.plan(config.setting(scores.config.serving), scores.tables)
    if isinstance(config, CorConfig) and config.admin:
        # vLLM builds models under their own default dtype; the routing step adds float32.
        zeros = torch.zeros(scores.num_experts, dtype=torch.float32)
        layers = [dataclasses.replace(x, bias=zeros.clone()) if x.bias is None else x for x in layers]
    return {layer.layer_index: layer for layer in layers}


def doubts(config: RoutingOptions, scores: Scores) -> list[str]:
    """One line for each thing that the options do and that is hardly meant.

    Args:
        config: the options, resolved.
        scores: the scores file that they name.
    """
    lines = []
    if scores.config.heldout and (harm := scores.config.heldout.harm(config.mode or "static k")):
        lines.append(harm)
    if not has_lambda(config.mode):
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
