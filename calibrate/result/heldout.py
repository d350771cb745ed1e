"""Does the result help? Loss on positions that calibration did not use, under each routing mode."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cor_vllm import modes
from cor_vllm.calibrate.interventions.checks import check_losses
from cor_vllm.calibrate.model.batches import cut, pad, sequence_batches
from cor_vllm.calibrate.model.forward import batch_losses
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.router import Rule, rule_of
from cor_vllm.calibrate.result.statistics import mean_and_sem
from cor_vllm.metadata import AlternativeInfo, HeldoutInfo, LossStat, ModeLoss
from cor_vllm.modes import MODES, SWAP_RATE_LAMBDAS, Setting, by_size, has_lambda, plan


@dataclass(frozen=True, eq=False)
class Tables:
    """What routing needs of a result; M layers, N experts."""

    k: Sequence[int]  # [M]
    cei: torch.Tensor  # [M, N] float32, normalised


def rules(model: MoeModel, tables: Tables, mode: str, lam: float, seed: int) -> dict[int, Rule]:
    """The routing of a mode, by the number of the MoE layer (0 to M−1).

    Args:
        model: the model.
        tables: k_l and CEI.
        mode: a name of modes.MODES.
        lam: λ of Eq. 9.
        seed: of a mode whose score is drawn.
    """
    setting = Setting(mode=mode, lambda_=lam, seed=seed)
    layers = plan(setting, modes.Tables(model.layer_index, model.top_k, tables.k, tables.cei))
    return {number: rule_of(model.routers[number], layer) for number, layer in enumerate(layers)}


def position_losses(
    model: MoeModel, sequences: Sequence[Sequence[int]], routings: Sequence[Mapping[int, Rule]]
) -> list[torch.Tensor]:
    """For each routing ({}: the model's own), [P] float32 losses of all positions, nats.

    Raises:
        CalibrationError: a loss is not finite.
    """
    padded = [pad(group) for group in sequence_batches(sequences)]
    losses = [cut(batches, sequences) for batches in batch_losses(model, padded, routings)]
    for values in losses:
        check_losses(model, values, "held-out losses")
    return losses


def check(
    model: MoeModel,
    sequences: Sequence[Sequence[int]],
    tables: Tables,
    lam: float,
    hard_percentile: float,
    seed: int,
) -> HeldoutInfo:
    """Mean loss under stock routing and every mode that changes it, each against stock, paired.

    Hard are the positions above the percentile of the held-out positions' own stock losses, or all if none
    is. Standard errors take positions as independent.

    Args:
        sequences: held-out token ids.
        lam: λ of `expert` and `full`; recorded.
        hard_percentile: 0 to 100.
    """
    names = [mode for mode in by_size() if not MODES[mode].is_stock]
    routings = [rules(model, tables, mode, lam, seed) for mode in names]
    stock, *others = position_losses(model, sequences, [{}, *routings])
    hard = stock > torch.quantile(stock.double(), hard_percentile / 100)
    if not hard.any():  # a single position, or all alike
        hard = torch.ones_like(hard)
    stats = {
        name: _mode_loss(losses, stock, hard)
        for name, losses in zip(["stock", *names], [stock, *others], strict=True)
    }
    named: dict[str, Any] = {"lambda": lam}  # a word of Python's own
    return HeldoutInfo(positions=len(stock), hard_positions=int(hard.sum()), modes=stats, **named)


@dataclass(frozen=True, eq=False)
class Alternative:
    """A setting that the user could have asked for, and the flags that ask for it."""

    flags: str
    mode: str
    lam: float
    tables: Tables


def compare(
    model: MoeModel,
    sequences: Sequence[Sequence[int]],
    chosen: Alternative,
    others: Sequence[Alternative],
    seed: int,
) -> list[AlternativeInfo]:
    """Loss of each alternative minus that of the chosen setting: paired mean and standard error, nats."""
    routings = [
        rules(model, setting.tables, setting.mode, setting.lam, seed) for setting in (chosen, *others)
    ]
    own, *losses = (values.double() for values in position_losses(model, sequences, routings))
    trials = []
    for other, values in zip(others, losses, strict=True):
        difference, sem = mean_and_sem(values - own)
        trials.append(AlternativeInfo(flags=other.flags, difference=difference, sem=sem))
    return trials


def _mode_loss(losses: torch.Tensor, stock: torch.Tensor, hard: torch.Tensor) -> ModeLoss:
    return ModeLoss(all=_stat(losses, stock), hard=_stat(losses[hard], stock[hard]))


def _stat(losses: torch.Tensor, stock: torch.Tensor) -> LossStat:
    difference, sem = mean_and_sem(losses.double() - stock.double())
    return LossStat(mean=losses.double().mean().item(), difference=difference, sem=sem)


@dataclass(frozen=True)
class Candidate:
    """One serving setting and its loss against stock on the tuning half."""

    mode: str
    lam: float
    difference: float  # nats
    sem: float


def tune(
    model: MoeModel, sequences: Sequence[Sequence[int]], tables: Tables, seed: int
) -> tuple[Candidate, list[Candidate]]:
    """Choose mode and λ by mean loss over all positions of the tuning half.

    Candidates: stock routing (`off`), `layer`, and `expert` and `full` with each λ of SWAP_RATE_LAMBDAS; the
    first of equals wins, so nothing displaces stock without lowering the loss.

    Returns:
        The winner and all candidates.
    """
    settings = list(_settings())
    routings = [rules(model, tables, mode, lam, seed) for mode, lam in settings]
    stock, *others = position_losses(model, sequences, [{}, *routings])
    candidates = [Candidate("off", 0.0, 0.0, 0.0)]
    for (mode, lam), losses in zip(settings, others, strict=True):
        candidates.append(Candidate(mode, lam, *mean_and_sem(losses.double() - stock.double())))
    return min(candidates, key=lambda candidate: candidate.difference), candidates


def _settings() -> Iterable[tuple[str, float]]:
    tried = [mode for mode in by_size() if not (MODES[mode].random or MODES[mode].is_stock)]
    yield from ((mode, 0.0) for mode in tried if not has_lambda(mode))
    for lam in SWAP_RATE_LAMBDAS:
        yield from ((mode, lam) for mode in tried if has_lambda(mode))
