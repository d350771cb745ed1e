"""Refuses measurements that mean nothing: numbers that are not finite, and routers that ignore the token."""

from collections.abc import Sequence

import torch

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.interventions.measurement import Baseline, LayerMeasurement
from cor_vllm.calibrate.model.moe_model import MoeModel

# Share of the largest logit by which the sums of one router may differ without meaning.
ROUNDING = 16 * torch.finfo(torch.float32).eps
NAMED = 8  # how many layers a message lists


def check_baseline(model: MoeModel, base: Baseline, sequences: Sequence[Sequence[int]]) -> None:
    """Check that router logits and losses are finite, and that every router's choice depends on the token.

    A router's choice cannot depend on the token if its logits are the same for every token, or for every
    expert: its weights are zeros or copies of one row, so it was not loaded. A router that is merely flat,
    with small differences, passes. If all tokens are the same, nothing can be told and nothing is refused.

    Args:
        sequences: the token ids of the baseline's positions.

    Raises:
        CalibrationError: one of these does not hold; the message names the decoder layers.
    """
    layers = list(zip(model.layer_index, base.router_logits, strict=True))
    broken = [index for index, logits in layers if not logits.isfinite().all()]
    if broken:
        raise CalibrationError(
            f"router logits are not finite in {named(broken)}, computed in {model.model.dtype}; "
            f"{_remedy(model)}"
        )
    check_losses(model, base.losses, "losses")
    if len({token for ids in sequences for token in ids[:-1]}) < 2:
        return
    blind = [index for index, logits in layers if ignores_the_token(logits)]
    if blind:
        raise CalibrationError(
            f"the routers of {named(blind)} choose the same experts for every token: their weights are zeros "
            "or were not loaded, so there is nothing to calibrate; check the checkpoint, or get it again"
        )


def ignores_the_token(logits: torch.Tensor) -> bool:
    """Whether [P, N] router logits differ between tokens by no more than one number for all experts."""
    values = logits.double()
    relative = values - values.mean(dim=1, keepdim=True)  # what a softmax, and any choice, depends on
    differences = (relative.amax(dim=0) - relative.amin(dim=0)).max()
    return bool(differences <= ROUNDING * values.abs().max())


def check_losses(model: MoeModel, losses: torch.Tensor, what: str) -> None:
    """Raise a CalibrationError that says how many of the losses [P] are not finite, if any."""
    broken = int((~losses.isfinite()).sum())
    if broken:
        raise CalibrationError(
            f"{broken} of {len(losses)} {what} are not finite in {model.model.dtype}; {_remedy(model)}"
        )


def check_measured(model: MoeModel, measured: Sequence[LayerMeasurement]) -> None:
    """Raise a CalibrationError that names the decoder layers whose loss changes are not finite, if any."""
    broken = [
        index
        for index, layer in zip(model.layer_index, measured, strict=True)
        if not all(values.isfinite().all() for values in layer.tensors().values())
    ]
    if broken:
        raise CalibrationError(
            f"interventions on {named(broken)} gave losses that are not finite in {model.model.dtype}; "
            f"{_remedy(model)}"
        )


def named(layers: Sequence[int]) -> str:
    """Name decoder layers in words: "decoder layer 3", or "decoder layers 0, 1, 2, …"."""
    if len(layers) == 1:
        return f"decoder layer {layers[0]}"
    more = f", … ({len(layers)} in all)" if len(layers) > NAMED else ""
    return f"decoder layers {', '.join(map(str, layers[:NAMED]))}{more}"


def _remedy(model: MoeModel) -> str:
    if model.model.dtype in (torch.float32, torch.float64):
        return "check the checkpoint, or get it again"
    return "try --dtype float32, or check the checkpoint"
