"""Does a layer compute with the router of a router file? Compared with x·Wᵀ in float64, computed here.

Source: docs/reference/router-file.md.
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

from cor_vllm.overlay import RouterOverlay
from cor_vllm.verify.judge import selects_best

if TYPE_CHECKING:
    from cor_vllm.verify.probe import LayerRecord

SUMMING = 2.0**-18  # of the sum of all products' sizes; float32 adds up thousands of them to within less


@dataclasses.dataclass(frozen=True)
class GateVerdict:
    """What was found at the layer whose router is replaced; `problems` is empty if all is as it should be."""

    worker: int
    layer: int
    name: str
    tokens: int
    logits_error: float  # largest difference of a router logit from x·Wᵀ
    as_expected: float | None  # share of tokens with the experts of x·Wᵀ; None if a scores file selects, too
    problems: tuple[str, ...]


def judge_gate(record: "LayerRecord", overlay: RouterOverlay, alone: bool, worker: int = 0) -> GateVerdict:
    """Compare what was recorded at a layer with what the router of the file makes of the same activations.

    Args:
        record: of the layer, from probe.recording with this layer's linear layer.
        overlay: the router file.
        alone: the experts are those of the router's own score; a scores file has judge.py.
        worker: its rank.
    """
    verdict = GateVerdict(worker, record.layer_index, record.name, 0, float("inf"), None, ())
    if record.gate_input is None or record.gate_output is None:
        return dataclasses.replace(verdict, problems=("its router was never asked",))
    wanted, allowed = _logits(record, overlay)
    off = np.abs(record.gate_output.double().numpy() - wanted)
    problems = []
    if not (off <= allowed).all():
        problems.append(
            f"its router's logits differ from those of the router file by up to {off.max():.2g}: the model's "
            "own router, or another one, is in force"
        )
    share = None
    if alone:
        share, found = _experts(record)
        problems += found
    return dataclasses.replace(
        verdict,
        tokens=len(wanted),
        logits_error=float(off.max()),
        as_expected=share,
        problems=tuple(problems),
    )


def _experts(record: "LayerRecord") -> tuple[float, list[str]]:
    """Share of tokens whose experts are the best by the logits that the layer made; and what is wrong."""
    made, given = record.gate_output, record.router_logits
    if made is None or given is None or record.topk_ids is None:
        return 0.0, ["its expert kernel was never given expert ids"]
    problems = []
    # With tokens of several ranks the router is given more rows than this rank's layer made.
    if made.shape == given.shape and not torch.equal(made.float(), given.float()):
        problems.append("its router was given other logits than its linear layer made")
    right = selects_best(record)
    if not right.all():
        problems.append(
            f"{(~right).sum()} of {right.size} tokens have other experts than the router file says"
        )
    return float(right.mean()) if right.size else 0.0, problems


def _logits(record: "LayerRecord", overlay: RouterOverlay) -> tuple[np.ndarray, np.ndarray]:
    """[T, N] float64: x·Wᵀ and the bias; and how far from it the engine's arithmetic may be."""
    assert record.gate_input is not None and record.gate_output is not None, "checked by the caller"
    x, weight = record.gate_input.double().numpy(), overlay.weight.double().numpy()
    bias = 0.0 if record.gate_bias is None else record.gate_bias.double().numpy()
    wanted = x @ weight.T + bias
    # A product in 16 bits is rounded once, and the logits may be kept in more bits than that.
    rounded = max(torch.finfo(record.gate_output.dtype).eps, torch.finfo(record.gate_input.dtype).eps)
    return wanted, rounded * np.abs(wanted) + SUMMING * (np.abs(x) @ np.abs(weight).T + np.abs(bias))
