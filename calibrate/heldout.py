"""Does the result help? Loss on positions that calibration did not use, under each routing mode."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cor_vllm.calibrate.moe_model import MoeModel, Rule
from cor_vllm.calibrate.plain import Row, batches, pad
from cor_vllm.calibrate.statistics import mean_and_sem
from cor_vllm.kernels.reference import probabilities, select
from cor_vllm.metadata import HeldoutInfo, LossStat, Mode, ModeLoss
from cor_vllm.scores import SWAP_RATE_LAMBDAS


@dataclass(frozen=True, eq=False)
class Tables:
    """What routing needs of a result; M layers, N experts."""

    k: Sequence[int]  # [M]
    cei: torch.Tensor  # [M, N] float32, normalised


def rules(model: MoeModel, tables: Tables, mode: Mode, lam: float, seed: int) -> dict[int, Rule]:
    """The routing of a mode (method.md, "Modes"): MoE layer number → rule.

    Args:
        model: the model.
        tables: k_l and CEI.
        mode: one of the serving modes.
        lam: λ of Eq. 9.
        seed: of `random`, whose scores are drawn anew for every token and expert.
    """

    def rule(layer: int) -> Rule:
        top_k = tables.k[layer] if mode in ("full", "layer", "random") else model.top_k
        if mode == "random":
            generator = torch.Generator().manual_seed(seed + layer)
            return lambda logits: _random(model, logits, top_k, generator)
        bias = lam * tables.cei[layer].to(model.device) if mode in ("full", "expert") else None
        return lambda logits: model.route(logits, bias, top_k)

    return {layer: rule(layer) for layer in range(model.num_layers)}


def _random(
    model: MoeModel, router_logits: torch.Tensor, top_k: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.rand(router_logits.shape, generator=generator).to(router_logits.device)
    return select(probabilities(router_logits), scores, top_k, model.renormalize, model.scale)


def position_losses(
    model: MoeModel, sequences: Sequence[Sequence[int]], routing: Mapping[int, Rule] | None = None
) -> torch.Tensor:
    """[P] float32 losses of all positions, nats, under `routing` or under the model's own."""
    losses: list[torch.Tensor] = []
    for batch in batches([Row(s) for s in range(len(sequences))], sequences):
        with model.routing(routing or {}):
            values = model.losses(pad([ids for _, ids in batch]))
        losses += [row[: len(ids) - 1] for row, (_, ids) in zip(values, batch, strict=True)]
    return torch.cat(losses)


def check(
    model: MoeModel,
    sequences: Sequence[Sequence[int]],
    tables: Tables,
    lam: float,
    hard_percentile: float,
    seed: int,
) -> HeldoutInfo:
    """Mean loss under stock, layer, expert, full and random routing, each against stock, paired.

    Hard are the positions above the percentile of the held-out positions' own stock losses, or all where none
    is. Standard errors take positions as independent.

    Args:
        sequences: held-out token ids.
        lam: λ of `expert` and `full`; recorded.
        hard_percentile: 0 to 100.
    """
    stock = position_losses(model, sequences)
    hard = stock > torch.quantile(stock.double(), hard_percentile / 100)
    if not hard.any():  # a single position, or all alike
        hard = torch.ones_like(hard)
    modes = {"stock": _mode_loss(stock, stock, hard)}
    for mode in ("layer", "expert", "full", "random"):
        losses = position_losses(model, sequences, rules(model, tables, mode, lam, seed))
        modes[mode] = _mode_loss(losses, stock, hard)
    return HeldoutInfo(positions=len(stock), hard_positions=int(hard.sum()), modes=modes, **{"lambda": lam})


@dataclass(frozen=True, eq=False)
class Alternative:
    """A setting that the user could have asked for, and the flags that ask for it."""

    flags: str
    mode: Mode
    lam: float
    tables: Tables


def compare(
    model: MoeModel,
    sequences: Sequence[Sequence[int]],
    chosen: Alternative,
    others: Sequence[Alternative],
    seed: int,
) -> list[dict[str, Any]]:
    """Loss of each alternative minus that of the chosen setting: paired mean and standard error, nats."""

    def losses(setting: Alternative) -> torch.Tensor:
        routing = rules(model, setting.tables, setting.mode, setting.lam, seed)
        return position_losses(model, sequences, routing).double()

    own, trials = losses(chosen), []
    for other in others:
        difference, sem = mean_and_sem(losses(other) - own)
        trials.append({"flags": other.flags, "difference": difference, "sem": sem})
    return trials


def _mode_loss(losses: torch.Tensor, stock: torch.Tensor, hard: torch.Tensor) -> ModeLoss:
    return ModeLoss(all=_stat(losses, stock), hard=_stat(losses[hard], stock[hard]))


def _stat(losses: torch.Tensor, stock: torch.Tensor) -> LossStat:
    difference, sem = mean_and_sem(losses.double() - stock.double())
    return LossStat(mean=losses.double().mean().item(), difference=difference, sem=sem)


@dataclass(frozen=True)
class Candidate:
    """One serving setting and its loss against stock on the tuning half."""

    mode: Mode
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
    stock = position_losses(model, sequences)
    candidates = [Candidate("off", 0.0, 0.0, 0.0)]
    for mode, lam in _settings():
        losses = position_losses(model, sequences, rules(model, tables, mode, lam, seed))
        candidates.append(Candidate(mode, lam, *mean_and_sem(losses.double() - stock.double())))
    return min(candidates, key=lambda candidate: candidate.difference), candidates


def _settings() -> Iterable[tuple[Mode, float]]:
    yield "layer", 0.0
    for lam in SWAP_RATE_LAMBDAS:
        yield "expert", lam
        yield "full", lam
