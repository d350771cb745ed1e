"""The per-layer expert budget (paper Eq. 8): intensities in, Σ k_l experts out. Pure Python."""

from collections.abc import Sequence
from fractions import Fraction
from math import floor, isfinite


def allocate(intensity: Sequence[float], total: int, k_min: int, k_max: int) -> list[int]:
    """Distribute exactly `total` experts over the layers, in proportion to their intensity.

    Quotas are proportional to max(intensity, 0) and held in [k_min, k_max] by one common scale c,
    quota_l = clip(c·R_l, k_min, k_max) (water-filling); the largest remainders take what rounding down
    leaves over, ties go to the lower layer. If no intensity is positive, the budget is uniform.

    Args:
        intensity: R_l of each MoE layer, any finite numbers.
        total: Σ k_l, the number of MoE layers times the model's own top_k.
        k_min: least experts of a layer, at least 1.
        k_max: most experts of a layer.

    Returns:
        k_l of each layer; every one in [k_min, k_max], their sum is `total`.

    Raises:
        ValueError: no such allocation exists, or an intensity is not finite.

    Source: Eq. 8; bounds, exact sum and ties are choices of this project, see docs/reference/method.md.
    """
    layers = len(intensity)
    if not all(isfinite(r) for r in intensity):
        raise ValueError(f"intensity must be finite, got {list(intensity)}")
    if not 1 <= k_min <= k_max:
        raise ValueError(f"k_min {k_min} and k_max {k_max} must satisfy 1 ≤ k_min ≤ k_max")
    if not layers * k_min <= total <= layers * k_max:
        raise ValueError(f"{total} experts do not fit {layers} layers of {k_min} to {k_max} each")
    quotas = _quotas([Fraction(max(r, 0.0)) for r in intensity], total, k_min, k_max)
    k = [floor(q) for q in quotas]
    by_remainder = sorted(range(layers), key=lambda layer: (k[layer] - quotas[layer], layer))
    for layer in by_remainder[: total - sum(k)]:
        k[layer] += 1
    return k


def _quotas(weights: list[Fraction], total: int, k_min: int, k_max: int) -> list[Fraction]:
    """clip(c·w_l, k_min, k_max) with the c that makes them sum to `total`, exactly.

    The sum grows with c and is linear between the points where a layer leaves k_min or reaches k_max, so
    the piece that holds `total` is found by walking those points.
    """
    positive = [w for w in weights if w > 0]
    if not positive:
        weights = positive = [Fraction(1)] * len(weights)

    def at(c: Fraction) -> list[Fraction]:
        return [min(max(c * w, Fraction(k_min)), Fraction(k_max)) for w in weights]

    points = sorted({Fraction(bound) / w for w in positive for bound in (k_min, k_max)})
    low, high = 0, len(points) - 1
    if sum(at(points[high])) < total:
        return _fill_zero_layers(at(points[high]), weights, total)
    while low < high:
        middle = (low + high) // 2
        if sum(at(points[middle])) >= total:
            high = middle
        else:
            low = middle + 1
    quotas = at(points[low])
    excess = Fraction(sum(quotas)) - total
    if excess == 0 or low == 0:
        return quotas
    # Between the two points only the layers inside the bounds move, each in proportion to its weight.
    before = at(points[low - 1])
    share = excess / Fraction(sum(quotas) - sum(before))
    return [q - share * (q - b) for q, b in zip(quotas, before, strict=True)]


def _fill_zero_layers(quotas: list[Fraction], weights: list[Fraction], total: int) -> list[Fraction]:
    """Every layer with a positive weight is full; the rest of the budget is shared by those without."""
    zero = [w == 0 for w in weights]
    extra = Fraction(total - sum(quotas)) / sum(zero)
    return [q + extra if z else q for q, z in zip(quotas, zero, strict=True)]


def allocate_paper(intensity: Sequence[float], total: int, k_max: int) -> list[int]:
    """The paper's literal Eq. 8: k_l = max(1, round(total · R_l / Σ R)), whose sum can miss `total`.

    Args:
        intensity: R_l of each MoE layer; negative ones count as 0.
        total: the budget that the sum is meant to meet.
        k_max: the most experts that a token can have, all of a layer's or those of the groups it keeps.

    Returns:
        k_l in [1, k_max]; uniform if no intensity is positive.
    """
    if not all(isfinite(r) for r in intensity):
        raise ValueError(f"intensity must be finite, got {list(intensity)}")
    weights = [Fraction(max(r, 0.0)) for r in intensity]
    scale = sum(weights)
    if scale == 0:
        weights, scale = [Fraction(1)] * len(weights), Fraction(len(weights))
    return [min(max(1, round(total * w / scale)), k_max) for w in weights]
