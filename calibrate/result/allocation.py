"""Turns intensities into k_l (Eq. 8): chooses the budget rule and its bounds."""

from collections.abc import Sequence

from cor_vllm.budget import allocate, allocate_paper
from cor_vllm.calibrate.config import CalibrationError, CalibrationOptions
from cor_vllm.metadata import BudgetInfo

NOISE = 2.0  # standard errors that a gain must exceed before an expert moves to another layer

Estimate = tuple[float, float]
"""A mean and its standard error, nats."""


def bounds(options: CalibrationOptions, eligible: int, top_k: int) -> tuple[int, int]:
    """The bounds (k_min, k_max) of every k_l.

    The options give them; the defaults are max(1, top_k // 2) and min(eligible, 2·top_k). `--budget paper`
    has no bounds: 1 and `eligible`.

    Args:
        options: of them the rule and the bounds.
        eligible: the most experts that one token can have: N, or the size of the groups that a router keeps.
        top_k: the model's own experts per token.

    Raises:
        CalibrationError: the model's own top_k or the eligible experts do not fit the bounds asked for.
    """
    if options.budget == "paper":
        return 1, eligible
    k_min = options.k_min or max(1, top_k // 2)
    k_max = options.k_max or min(eligible, 2 * top_k)
    if not k_min <= top_k <= k_max <= eligible:
        raise CalibrationError(
            f"--k-min {k_min} and --k-max {k_max} must hold the model's own {top_k} experts per token "
            f"between them and not exceed the {eligible} experts that its router lets a token choose among"
        )
    return k_min, k_max


def budget(
    options: CalibrationOptions,
    eligible: int,
    top_k: int,
    intensity: Sequence[float],
    marginal: Sequence[tuple[Estimate | None, Estimate | None]] = (),
) -> tuple[list[int], BudgetInfo]:
    """Choose k_l of every layer.

    Args:
        options: of them rule, intensity and bounds.
        eligible, top_k: the most experts that a token can have, and the model's own number.
        intensity: R_l or S_l(hard) by layer; unused under `--intensity marginal`.
        marginal: for each layer the loss change with one expert fewer and with one more (see `move_units`).
    """
    k_min, k_max = bounds(options, eligible, top_k)
    total = top_k * len(intensity)
    if options.intensity == "marginal":
        k = move_units(marginal, top_k, k_min, k_max)
    elif options.budget == "paper":
        k = allocate_paper(intensity, total, eligible)
    else:
        k = allocate(intensity, total, k_min, k_max)
    return k, BudgetInfo(rule=options.budget, k_min=k_min, k_max=k_max, total=total, sum=sum(k))


def move_units(
    marginal: Sequence[tuple[Estimate | None, Estimate | None]], top_k: int, k_min: int, k_max: int
) -> list[int]:
    """Start with top_k everywhere; move single experts from layers that lose least to those that gain most.

    Only top_k ± 1 was measured, so a layer gives or takes one expert at most. The pair of layers with the
    greatest net gain comes first. Moving stops when the best net gain left is not beyond NOISE of its
    standard errors.

    Args:
        marginal: for each layer (fewer, more): mean and standard error of the loss change on hard positions
            with top_k − 1 and top_k + 1 experts, nats; None if that number of experts does not exist.
        top_k, k_min, k_max: k_l stays in [k_min, k_max]; their sum stays M·top_k.

    Source: docs/reference/method.md, "Weak spots", `marginal`.
    """
    k = [top_k] * len(marginal)
    givers = {i: fewer for i, (fewer, _) in enumerate(marginal) if fewer and top_k - 1 >= k_min}
    takers = {i: more for i, (_, more) in enumerate(marginal) if more and top_k + 1 <= k_max}
    while True:
        pairs = [
            (-takers[j][0] - givers[i][0], -i, -j) for i in givers for j in takers if i != j
        ]  # net gain; ties go to the lower layers
        if not pairs:
            return k
        gain, giver, taker = max(pairs)
        giver, taker = -giver, -taker
        if gain <= NOISE * (givers[giver][1] ** 2 + takers[taker][1] ** 2) ** 0.5:
            return k
        k[giver] -= 1
        k[taker] += 1
        for layer in (giver, taker):
            givers.pop(layer, None)
            takers.pop(layer, None)
