"""What a trained router does on documents that no choice saw: loss changes, and what became of its routes."""

import math

import torch

from cor_vllm.calibrate.reroute import objectives
from cor_vllm.calibrate.reroute.problem import Problem
from cor_vllm.calibrate.reroute.training import SCANNED, Pairs, TrainingOptions, find_pairs
from cor_vllm.calibrate.result.statistics import document_interval
from cor_vllm.overlay import HeldoutBin

BINS = {"all": (0.0, 1.0), "confident": (0.9, 1.0), "ambiguous": (0.5, 0.9), "fragile": (0.0, 0.5)}
"""Probability that the model's own router gave the token: from the first value on, below the second."""


def in_bin(name: str, probability: torch.Tensor) -> torch.Tensor:
    """[R] bool: which of these probabilities belong to a bin; 1 belongs to the highest."""
    low, high = BINS[name]
    return (probability >= low) & ((probability < high) | (high == 1.0))


def heldout(
    problem: Problem, weight: torch.Tensor, rows: torch.Tensor, epsilon: float, seed: int
) -> dict[str, HeldoutBin]:
    """Loss changes of `rows` under a weight [N, D], by the model's own probability of the token."""
    base = problem.executed(problem.weight, rows)[1].double()
    change = problem.executed(weight, rows)[1].double() - base
    documents = problem.documents[rows]
    probability = base.neg().exp()
    inside = {name: in_bin(name, probability) for name in BINS}
    return {
        name: _bin(base[rows], change[rows], documents[rows], epsilon, seed) for name, rows in inside.items()
    }


def _bin(
    base: torch.Tensor, change: torch.Tensor, documents: torch.Tensor, epsilon: float, seed: int
) -> HeldoutBin:
    count = len(documents.unique())
    if not len(base):
        return HeldoutBin(
            positions=0, documents=0, base=None, change=None, low=None, high=None, median=None, win_rate=None
        )
    low, high = document_interval(change, documents, seed) or (None, None)
    return HeldoutBin(
        positions=len(base),
        documents=count,
        base=base.mean().item(),
        change=change.mean().item(),
        low=low,
        high=high,
        median=change.median().item(),
        win_rate=(change < -epsilon).double().mean().item(),
    )


@torch.no_grad()
def diagnostics(
    problem: Problem, weight: torch.Tensor, rows: torch.Tensor, options: TrainingOptions
) -> dict[str, float]:
    """What became of the routes, with r⁻ the standard route of the model's own router and r⁺ its best draw.

    Args:
        problem: the layer.
        weight: [N, D] float32, the trained router's.
        rows: [R] int64.
        options: of the training.

    Returns:
        `pairs`: tokens with an r⁺. Of these: `preference_accuracy`, the share that prefers r⁺ more than the
        model's own router does; `adoption`, the share that executes just r⁺; `overlap` and `overlap_before`,
        experts in common with r⁺, executed with this router and with the model's own; `neither`, the share of
        executed slots in neither route. Of all tokens: `changed`, experts that differ from r⁻, and by bin
        `changed_confident` and so on. A figure without a token is left out.
    """
    found = [find_pairs(problem, problem.weight, block, options) for block in rows.split(SCANNED)]
    pairs = Pairs(*(torch.cat(values) for values in zip(*(vars(p).values() for p in found), strict=True)))
    before, losses = problem.executed(problem.weight, rows)
    after, _ = problem.executed(weight, rows)
    changed = problem.router.top_k - _common(before, after).double()
    probability = losses.double().neg().exp()
    figures = {"pairs": float(len(pairs)), "changed": changed.mean().item()}
    for name in list(BINS)[1:]:
        figures[f"changed_{name}"] = changed[in_bin(name, probability)].mean().item()
    if len(pairs):
        figures |= _of_pairs(problem, weight, pairs)
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _of_pairs(problem: Problem, weight: torch.Tensor, pairs: Pairs) -> dict[str, float]:
    z, own = (problem.logits(w, pairs.rows) for w in (weight, problem.weight))
    executed, _ = problem.executed(weight, pairs.rows)
    overlap = _common(executed, pairs.better)
    either = (executed[:, :, None] == torch.cat([pairs.better, pairs.worse], dim=1)[:, None]).any(dim=2)
    preferred = objectives.preference(z, own, pairs.better, pairs.worse) > 0
    return {
        "preference_accuracy": preferred.double().mean().item(),
        "adoption": (overlap == problem.router.top_k).double().mean().item(),
        "overlap": overlap.double().mean().item(),
        "overlap_before": _common(pairs.worse, pairs.better).double().mean().item(),
        "neither": (~either).double().mean().item(),
    }


def _common(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[R] how many experts two routes [R, k] share."""
    return (first[:, :, None] == second[:, None]).any(dim=2).sum(dim=1)
