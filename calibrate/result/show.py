"""`cor-vllm show`: prints what is in a scores file, as a table or as JSON."""

import json
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cor_vllm.calibrate.result.statistics import full_reliability, samples_for
from cor_vllm.metadata import HeldoutInfo
from cor_vllm.scores import SWAP_RATE_LAMBDAS, Scores

DORMANT_CEI = 0.5  # of normalised CEI: the upper half of the layer's range
SIGNIFICANT = 2.0  # standard errors
RELIABLE = 0.8  # the correlation that CEI should have with CEI from as many other positions


def dormant(scores: Scores) -> torch.Tensor:
    """Experts that the router rarely chooses although taking them away hurts: [M, N] bool.

    Their mean router probability is below an even share, their normalised CEI at least DORMANT_CEI, and their
    raw CEI positive.
    """
    rare = scores.router_prob.double() < even_share(scores)
    return rare & (scores.cei >= DORMANT_CEI) & (scores.cei_raw > 0)


def even_share(scores: Scores) -> torch.Tensor:
    """The mean of each layer's router probabilities, [M, 1] float64; with a softmax it is 1/N."""
    return scores.router_prob.double().mean(dim=1, keepdim=True)


def warnings(scores: Scores) -> list[str]:
    """One line for each reason in the file's own numbers to distrust it."""
    config, lines = scores.config, []
    if config.heldout and (harm := config.heldout.harm(config.serving.mode)):
        lines.append(harm)
    calibration = config.calibration
    sems = calibration.sensitivity_easy_sem
    if sems and calibration.intensity == "ratio":
        unclear = (scores.sensitivity_easy.abs() <= SIGNIFICANT * torch.tensor(sems)).sum().item()
        if unclear:
            lines.append(
                f"S(easy) is not distinguishable from zero in {unclear} of {scores.num_layers} layers, so "
                "R_l is mostly noise there; --intensity hard or marginal is steadier"
            )
    correlation = calibration.cei_split_half
    if correlation is not None and full_reliability(correlation) < RELIABLE:
        lines.append(f"too few hard positions for CEI: {reliability(scores)}")
    return lines


def reliability(scores: Scores) -> str:
    """Say how well the hard positions determine CEI, and how many would be enough; "" if not known."""
    calibration = scores.config.calibration
    correlation, rank = calibration.cei_split_half, calibration.cei_split_half_rank
    if correlation is None:
        return ""
    ranks = f" (ranks within layers: {rank:.2f})" if rank is not None else ""
    halves = f"halves of the {calibration.num_hard} correlate at {correlation:.2f}{ranks}"
    needed = samples_for(RELIABLE, correlation, calibration.num_hard)
    if needed is None:
        return (
            f"{halves}, so CEI is not reproducible; how many positions would do cannot be told, try ten "
            "times as many"
        )
    found = f"{halves}, so all of them have a reliability of {full_reliability(correlation):.2f}"
    if calibration.positions:
        return f"{found}; {RELIABLE:g} takes about {_rough(needed)}: name more in --positions"
    tokens = needed * calibration.num_positions / max(calibration.num_hard, 1)
    return f"{found}; {RELIABLE:g} takes about {_rough(needed)}: --num-tokens {_rough(tokens)}"


def _rough(number: float) -> int:
    """Round to two digits: an estimate from one split has no more."""
    return int(float(f"{number:.1e}"))


def better_flags(scores: Scores) -> list[str]:
    """Settings whose held-out loss was lower than that of the file's own settings by more than its noise."""
    heldout = scores.config.heldout
    trials = heldout.alternatives if heldout else []
    return [
        f"{trial.flags} ({trial.difference:+.4f} ± {trial.sem:.4f} nats)"
        for trial in sorted(trials, key=lambda trial: trial.difference)
        if trial.difference < -SIGNIFICANT * trial.sem
    ]


def as_json(scores: Scores) -> str:
    """All that the table shows, and the whole `config`, as JSON for programs."""
    layers = []
    asleep = dormant(scores)
    intervals = scores.config.calibration.rki_interval
    for m in range(scores.num_layers):
        layers.append({
            "layer": scores.layer_index[m].item(),
            "rki": scores.rki[m].item(),
            "rki_interval": intervals[m] if intervals else None,
            "sensitivity_hard": scores.sensitivity_hard[m].item(),
            "sensitivity_easy": scores.sensitivity_easy[m].item(),
            "k": scores.k[m].item(),
            "cei_raw_min": scores.cei_raw[m].min().item(),
            "cei_raw_max": scores.cei_raw[m].max().item(),
            "experts_seen": int((scores.cei_count[m] > 0).sum()),
            "dormant_experts": asleep[m].nonzero().flatten().tolist(),
            "swap_rate": dict(zip(map(str, SWAP_RATE_LAMBDAS), scores.swap_rate[m].tolist(), strict=True)),
        })  # fmt: skip
    config: dict[str, Any] = scores.config.model_dump(mode="json", by_alias=True)
    return json.dumps(
        {"config": config, "layers": layers, "warnings": warnings(scores), "better": better_flags(scores)},
        indent=2,
    )


def print_scores(scores: Scores, console: Console) -> None:
    """Print a header, the table of layers, swap rates, the held-out table, and warnings."""
    config = scores.config
    calibration, budget = config.calibration, config.budget
    console.print(
        f"{config.model.name} ({config.model.architecture}): {scores.num_layers} MoE layers, "
        f"{scores.num_experts} experts, top_k {config.model.top_k}\n"
        f"calibrated on {calibration.corpus}: {calibration.num_positions} positions, "
        f"{calibration.num_hard} hard (loss > {calibration.tau_high:.3f} nats), "
        f"{calibration.num_easy} easy (< {calibration.tau_low:.3f})\n"
        f"budget {budget.rule}: Σ k = {budget.sum} of {budget.total}, k from {budget.k_min} to "
        f"{budget.k_max}; "
        f"served by default with mode {config.serving.mode}, λ = {config.serving.lambda_:g}",
        highlight=False,
    )
    console.print(_layer_table(scores))
    rates = scores.swap_rate.double().mean(0).tolist()
    shares = ", ".join(f"{lam:g}: {rate:.1%}" for lam, rate in zip(SWAP_RATE_LAMBDAS, rates, strict=True))
    console.print(f"slots that λ changes, mean over layers: {shares}", highlight=False)
    if reliability(scores):
        console.print(f"hard positions: {reliability(scores)}", highlight=False)
    if config.heldout:
        console.print(_heldout_table(config.heldout))
        better = better_flags(scores)
        found = "; ".join(better) if better else "none of the settings tried"
        console.print(f"would have done better on the held-out text: {found}", highlight=False)
    for line in warnings(scores):
        console.print(f"warning: {line}", style="yellow", highlight=False)


def _layer_table(scores: Scores) -> Table:
    table = Table("layer", "R_l", "95 % interval", "k_l", "CEI, nats", "seen", "dormant experts")
    for column in table.columns[:4]:
        column.justify = "right"
    asleep = dormant(scores)
    intervals = scores.config.calibration.rki_interval
    for m in range(scores.num_layers):
        raw = scores.cei_raw[m]
        ids = asleep[m].nonzero().flatten().tolist()
        table.add_row(
            str(scores.layer_index[m].item()),
            f"{scores.rki[m].item():.3g}",
            "{:.3g} … {:.3g}".format(*intervals[m]) if intervals else "",
            str(scores.k[m].item()),
            f"{raw.min().item():+.4f} … {raw.max().item():+.4f}",
            f"{int((scores.cei_count[m] > 0).sum())}/{scores.num_experts}",
            f"{len(ids)}: {' '.join(map(str, ids[:8]))}{' …' if len(ids) > 8 else ''}" if ids else "0",
        )
    return table


def _heldout_table(heldout: HeldoutInfo) -> Table:
    lam = heldout.lambda_
    title = f"held-out loss, nats: {heldout.positions} positions, {heldout.hard_positions} hard"
    table = Table(
        "mode", "all", "− stock", "hard", "− stock", title=f"{title}, λ = {lam:g}" if lam else title
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for mode, loss in heldout.modes.items():
        cells = []
        for stat in (loss.all, loss.hard):
            difference = "" if mode == "stock" else f"{stat.difference:+.4f} ± {stat.sem:.4f}"
            cells += [f"{stat.mean:.4f}", difference]
        table.add_row(mode, *cells)
    return table
