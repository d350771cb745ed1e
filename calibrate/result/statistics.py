"""Computes the numbers of a scores file from single loss changes. Pure torch; all sums are in float64."""

import math
from dataclasses import dataclass

import torch

BOOTSTRAP_DRAWS = 1000
DOCUMENT_DRAWS = 2000  # of documents
FEWEST_DOCUMENTS = 20  # with fewer there is no interval over documents


def mean_and_sem(values: torch.Tensor) -> tuple[float, float]:
    """Mean of [n] samples and its standard error, std(ddof=1)/√n; the error is 0 below 2 samples."""
    values = values.double()
    sem = values.std(unbiased=True).item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return values.mean().item(), sem


@dataclass(frozen=True, eq=False)
class ExpertImpact:
    """CEI of one layer before normalisation; N experts."""

    raw: torch.Tensor  # [N] float64, mean loss change without the expert, nats; 0 if count is 0
    sem: torch.Tensor  # [N] float64, its standard error; 0 below 2 samples
    count: torch.Tensor  # [N] int64, hard positions at which the expert was active


def expert_impact(active: torch.Tensor, ablation: torch.Tensor, num_experts: int) -> ExpertImpact:
    """Average the loss changes of each expert (Eq. 7).

    Args:
        active: [H, K] int64 expert ids.
        ablation: [H, K] float64 loss changes, nats.
        num_experts: N.
    """
    ids, changes = active.flatten(), ablation.flatten().double()
    zero = torch.zeros(num_experts, dtype=torch.float64)
    count = torch.bincount(ids, minlength=num_experts)
    mean = zero.index_add(0, ids, changes) / count.clamp(min=1)
    squares = zero.index_add(0, ids, (changes - mean[ids]) ** 2)
    sem = torch.where(count > 1, (squares / (count - 1).clamp(min=1) / count.clamp(min=1)).sqrt(), 0.0)
    return ExpertImpact(mean, sem, count)


def shrink(impact: ExpertImpact) -> torch.Tensor:
    """Shrink one layer's CEI towards 0 by its own sampling error (empirical Bayes): [N] float64.

        shrunk = raw · τ² / (τ² + sem²),   τ² = max(0, mean(raw² − sem²))

    τ² estimates the variance of the true values around 0 by the method of moments, over experts with two
    samples or more. An expert seen once has no error of its own and gets that of one draw with the layer's
    pooled variance; an expert never seen stays 0. A layer whose values are not larger than their errors
    (τ² = 0) becomes 0.
    """
    measured = impact.count > 1
    if not measured.any():
        return torch.zeros_like(impact.raw)
    squared_error = impact.sem**2
    tau = (impact.raw**2 - squared_error)[measured].mean().clamp(min=0)
    freedom = (impact.count[measured] - 1).double()
    pooled = (squared_error * impact.count)[measured] @ freedom / freedom.sum()
    squared_error = torch.where(measured, squared_error, pooled)
    total = tau + squared_error
    return impact.raw * torch.where(total > 0, tau / torch.where(total > 0, total, 1.0), 0.0)


def normalise(values: torch.Tensor) -> torch.Tensor:
    """Scale one layer's [N] values to [0, 1] by minimum and maximum, float32; equal values all become 0."""
    low, high = values.min(), values.max()
    if low == high:
        return torch.zeros(len(values))
    # Without the clamp, the division of very small differences could round beyond the range.
    return ((values - low) / (high - low)).clamp(0, 1).float()


def relative_intensity(hard: float, easy: float, epsilon: float) -> float:
    """R_l = S_l(hard) / (S_l(easy) + ε) (Eq. 4); 0 if the denominator is exactly 0."""
    denominator = easy + epsilon
    return hard / denominator if denominator else 0.0


def intensity_interval(
    hard: torch.Tensor, easy: torch.Tensor, epsilon: float, seed: int
) -> tuple[float, float]:
    """95 % bootstrap interval of R_l; the [H] hard and [E] easy samples are resampled independently."""
    generator = torch.Generator().manual_seed(seed)
    means = []
    for samples in (hard.double(), easy.double()):
        drawn = torch.randint(len(samples), (BOOTSTRAP_DRAWS, len(samples)), generator=generator)
        means.append(samples[drawn].mean(dim=1))
    denominator = means[1] + epsilon
    ratios = torch.where(denominator == 0, 0.0, means[0] / torch.where(denominator == 0, 1.0, denominator))
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def split_half_correlation(
    layers: list[tuple[torch.Tensor, torch.Tensor]], num_experts: int, seed: int, ranks: bool = False
) -> float | None:
    """How well CEI from one random half of the hard positions predicts CEI from the other.

    Args:
        layers: (active [H, K], ablation [H, K]) of every layer.
        num_experts: N.
        seed: seed of the split.
        ranks: correlate the experts' ranks within their layer, so that a few extreme values decide less.

    Returns:
        Pearson correlation over all experts seen in both halves, with layer means removed; None if fewer than
        three experts were seen in both, or if a half does not vary.
    """
    hard = len(layers[0][0])
    order = torch.randperm(hard, generator=torch.Generator().manual_seed(seed))
    sides: list[list[torch.Tensor]] = [[], []]
    for active, ablation in layers:
        halves = [
            expert_impact(active[rows], ablation[rows], num_experts)
            for rows in (order[: hard // 2], order[hard // 2 :])
        ]
        both = (halves[0].count > 0) & (halves[1].count > 0)
        for side, half in zip(sides, halves, strict=True):
            if both.any():
                values = half.raw[both]
                values = values.argsort().argsort().to(values) if ranks else values
                side.append(values - values.mean())
    if sum(map(len, sides[0])) < 3:
        return None
    first, second = torch.cat(sides[0]), torch.cat(sides[1])
    scale = (first.norm() * second.norm()).item()
    return (first @ second).item() / scale if scale > 0 else None


def full_reliability(split_half: float) -> float:
    """Spearman-Brown: the reliability of all samples from the correlation of their halves, 2r / (1 + r).

    Halves that do not agree (r ≤ 0) have the reliability 0; the formula would give values down to −∞.
    """
    return 2 * split_half / (1 + split_half) if split_half > 0 else 0.0


def samples_for(reliability: float, split_half: float, samples: int) -> int | None:
    """How many samples would have a reliability, if the halves of `samples` correlate at `split_half`.

    Spearman-Brown: n times as many samples have the reliability n·r / (1 + (n − 1)·r). This assumes that
    noise shrinks as 1/√n and that further samples are of the same kind. None if the halves do not agree at
    all.
    """
    if split_half <= 0:
        return None
    times = reliability * (1 - split_half) / (split_half * (1 - reliability))
    return math.ceil(times * samples / 2)


def document_interval(values: torch.Tensor, documents: torch.Tensor, seed: int) -> tuple[float, float] | None:
    """95 % percentile interval of the mean over positions, by resampling whole documents.

    Positions of one document are alike, so that resampling positions would give too narrow an interval.

    Args:
        values: [P].
        documents: [P] int64, the document of each position.
        seed: seed of the resampling.

    Returns:
        Lower and upper end; None if there are fewer than FEWEST_DOCUMENTS.

    Source: Davison & Hinkley (1997), 3.8, for resampling clusters.
    """
    _, index = documents.unique(return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    if count < FEWEST_DOCUMENTS:
        return None
    zero = torch.zeros(count, dtype=torch.float64)
    sums = zero.index_add(0, index, values.double())
    sizes = zero.index_add(0, index, torch.ones_like(values, dtype=torch.float64))
    drawn = torch.randint(count, (DOCUMENT_DRAWS, count), generator=torch.Generator().manual_seed(seed))
    means = sums[drawn].sum(dim=1) / sizes[drawn].sum(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
