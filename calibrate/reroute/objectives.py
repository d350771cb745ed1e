"""What the update of a router minimises. z are router logits; a route r has k of the N experts.

Source: arXiv 2605.07260 for `epo`; the others are controls.
"""

import torch
from torch.nn import functional

from cor_vllm.calibrate.reroute.problem import Problem


def preference(
    z: torch.Tensor, z_before: torch.Tensor, better: torch.Tensor, worse: torch.Tensor
) -> torch.Tensor:
    """log π(r⁺)/π₀(r⁺) − log π(r⁻)/π₀(r⁻) with π(r) = Π softmax(z)_e over the experts of r: [R].

    The softmax's normaliser counts k times on both sides and cancels, as experts in both routes do.

    Args:
        z: [R, N] logits of the router that is trained.
        z_before: [R, N], of the model's own.
        better, worse: [R, k] int64, r⁺ and r⁻.
    """
    moved = z - z_before
    return moved.gather(1, better).sum(dim=1) - moved.gather(1, worse).sum(dim=1)


def epo(
    z: torch.Tensor, z_before: torch.Tensor, better: torch.Tensor, worse: torch.Tensor, gain: torch.Tensor,
    beta: float,
) -> torch.Tensor:  # fmt: skip
    """Expert Preference Optimization: mean of −Δ·log σ(β·preference); `gain` [R] is Δ, nats."""
    return -(gain * functional.logsigmoid(beta * preference(z, z_before, better, worse))).mean()


def margin(selected_by: torch.Tensor, better: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Mean of Δ·softplus(max outside of r⁺ − min inside of r⁺): below 0 the router takes just r⁺.

    Args:
        selected_by: [R, N], what the router selects by, or logits in the same order.
        better: [R, k] int64.
        gain: [R] Δ, nats.
    """
    inside = torch.zeros_like(selected_by, dtype=torch.bool).scatter(1, better, True)
    highest = selected_by.masked_fill(inside, -torch.inf).amax(dim=1)
    lowest = selected_by.masked_fill(~inside, torch.inf).amin(dim=1)
    return (gain * functional.softplus(highest - lowest)).mean()


def cross_entropy(problem: Problem, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Mean loss of the routes that the router takes; the gradient comes through their weights alone."""
    weights, ids = problem.router.route(problem.logits(weight, rows))
    return problem.losses(rows, ids.long(), weights).mean()


def divergence(z: torch.Tensor, z_before: torch.Tensor) -> torch.Tensor:
    """Mean KL(π₀ ‖ π) between the softmax of the model's own logits and of the trained ones, nats."""
    return functional.kl_div(
        z.log_softmax(dim=1), z_before.log_softmax(dim=1), reduction="batchmean", log_target=True
    )
