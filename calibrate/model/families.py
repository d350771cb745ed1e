"""The transformers architectures that can be calibrated, and how each of them routes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.kernels.scoring import Scoring


@dataclass(frozen=True)
class Family:
    """How one architecture routes; each function takes a model's configuration."""

    router: str  # attribute of the MoE block
    renormalize: Callable[[Any], bool]  # does the model divide the weights by their sum
    scale: Callable[[Any], float] = lambda config: 1.0  # what multiplies the weights
    scoring_func: str = "softmax"
    groups: Callable[[Any], tuple[int, int]] = lambda config: (1, 1)  # groups of experts, those kept

    def scoring(self, config: Any, correction_bias: torch.Tensor) -> Scoring:
        """How a router of this family scores.

        Args:
            config: the model's configuration.
            correction_bias: [N] float32, the router's own; zeros if it has none.
        """
        return Scoring(
            self.scoring_func,
            self.renormalize(config),
            self.scale(config),
            *self.groups(config),
            correction_bias,
        )


def _norm_topk_prob(config: Any) -> bool:
    return bool(config.norm_topk_prob)


def _routed_scaling_factor(config: Any) -> float:
    return float(config.routed_scaling_factor)


_SIGMOID = Family(
    "gate",
    _norm_topk_prob,
    _routed_scaling_factor,
    scoring_func="sigmoid",
    groups=lambda config: (config.n_group, config.topk_group),
)
FAMILIES = {
    "qwen3_moe": Family("gate", _norm_topk_prob),
    "qwen2_moe": Family("gate", _norm_topk_prob),
    "olmoe": Family("gate", _norm_topk_prob),
    "mixtral": Family("gate", lambda config: True),
    "deepseek_v2": Family("gate", lambda config: False, _routed_scaling_factor),
    "deepseek_v3": _SIGMOID,
    "glm4_moe": _SIGMOID,
    "gpt_oss": Family("router", lambda config: True),
}


def num_experts(config: Any) -> int:
    """N, the routed experts of a layer."""
    found: int = config.num_experts if hasattr(config, "num_experts") else config.n_routed_experts
    return found


def eligible_experts(config: Any) -> int:
    """The most experts that one token can have: N, or as many as the groups that a router keeps hold."""
    groups, kept = FAMILIES[config.model_type].groups(config)
    return num_experts(config) // groups * kept


def check_family(config: Any) -> Family:
    """The table entry of a model's configuration.

    Raises:
        CalibrationError: the family, or its routing method, is not supported; the message names it.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        name = (config.architectures or ["?"])[0]
        raise CalibrationError(
            f"{name} (model_type {config.model_type!r}) is not supported; the calibrator knows "
            f"{', '.join(FAMILIES)}"
        )
    if config.model_type == "deepseek_v2":
        _check_deepseek_v2(config)
    if config.model_type == "deepseek_v3":
        _check_deepseek_v3(config)
    return family


def _check_deepseek_v2(config: Any) -> None:
    if config.topk_method != "greedy" and (config.n_group or 1) > 1:
        raise CalibrationError(
            f"deepseek_v2: topk_method {config.topk_method!r} with n_group {config.n_group} chooses among "
            "groups of experts by their best softmax, which the calibrator does not cover; use a model with "
            "greedy routing"
        )
    if config.norm_topk_prob:
        raise CalibrationError(
            "deepseek_v2: norm_topk_prob is set, which transformers ignores and vLLM does not: the model "
            "measured would not be the model served"
        )


def _check_deepseek_v3(config: Any) -> None:
    for name, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        found = getattr(config, name, None)
        if found != value:
            raise CalibrationError(
                f"deepseek_v3: {name} is {found!r} in config.json, which transformers ignores and vLLM does "
                f"not: the model measured would not be the model served; published models have {value!r}"
            )
