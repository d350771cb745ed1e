"""From measurements to the scores file's content."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from cor_vllm.calibrate.config import CalibrationOptions
from cor_vllm.calibrate.interventions.measurement import Baseline, LayerMeasurement
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.router import Router
from cor_vllm.calibrate.result import statistics
from cor_vllm.calibrate.result.allocation import budget
from cor_vllm.calibrate.result.heldout import Alternative, Tables, check, compare, tune
from cor_vllm.calibrate.text.inputs import Inputs
from cor_vllm.calibrate.text.stratify import Strata
from cor_vllm.metadata import (
    CalibrationInfo,
    HeldoutInfo,
    MarginalInfo,
    ModelInfo,
    ScoresConfig,
    ServingInfo,
    Trial,
    TuningInfo,
)
from cor_vllm.modes import MODES, by_size, has_lambda
from cor_vllm.scores import SWAP_RATE_LAMBDAS, Scores
from cor_vllm.version import __version__

DEFAULT_SERVING = ServingInfo()


def assemble(
    model: MoeModel,
    options: CalibrationOptions,
    info: ModelInfo,
    inputs: Inputs,
    base: Baseline,
    strata: Strata,
    measured: Sequence[LayerMeasurement],
) -> Scores:
    """Average, normalise, allocate, check on held-out text.

    Args:
        measured: one per MoE layer, in order.
    """
    hard = [statistics.mean_and_sem(layer.hard) for layer in measured]
    easy = [statistics.mean_and_sem(layer.easy) for layer in measured]
    rki = [
        statistics.relative_intensity(h, e, options.epsilon)
        for (h, _), (e, _) in zip(hard, easy, strict=True)
    ]
    impacts = [statistics.expert_impact(m.active, m.ablation, model.num_experts) for m in measured]
    cei = torch.stack([
        statistics.normalise(statistics.shrink(impact) if options.shrink else impact.raw)
        for impact in impacts
    ])  # fmt: skip
    marginal = [(_estimate(m.fewer), _estimate(m.more)) for m in measured]
    intensity = [mean for mean, _ in hard] if options.intensity == "hard" else rki
    k, budget_info = budget(options, model.eligible_experts, model.top_k, intensity, marginal)
    tables = Tables(k, cei)
    heldout, serving = _judge(model, options, inputs, tables)
    if heldout:
        others = _alternatives(model, options, tables, serving, impacts, [mean for mean, _ in hard], rki)
        heldout = _compared(model, options, inputs, heldout, tables, serving, others)
    details = _details(model, options, inputs, base, measured)
    return Scores(
        layer_index=torch.tensor(model.layer_index, dtype=torch.int32),
        k=torch.tensor(k, dtype=torch.int32),
        cei=cei,
        cei_raw=torch.stack([impact.raw for impact in impacts]).float(),
        cei_sem=torch.stack([impact.sem for impact in impacts]).float(),
        cei_count=torch.stack([impact.count for impact in impacts]).int(),
        rki=torch.tensor(rki).float(),
        sensitivity_hard=torch.tensor([mean for mean, _ in hard]),
        sensitivity_easy=torch.tensor([mean for mean, _ in easy]),
        router_prob=_router_prob(model, base, strata.hard),
        swap_rate=torch.stack([
            swap_rates(router, logits, row)
            for router, logits, row in zip(model.routers, base.router_logits, cei, strict=True)
        ]),
        config=ScoresConfig(
            model=info,
            calibration=_calibration(model, options, inputs, strata, details),
            budget=budget_info,
            heldout=heldout,
            serving=serving,
            versions=versions(),
        ),
    )  # fmt: skip


def _router_prob(model: MoeModel, base: Baseline, hard: torch.Tensor) -> torch.Tensor:
    """[M, N] float32, mean router probability on the positions that `hard` [P] bool names."""
    return torch.stack([
        router.probabilities(logits[hard]).double().mean(0).float()
        for router, logits in zip(model.routers, base.router_logits, strict=True)
    ])  # fmt: skip


def _compared(
    model: MoeModel,
    options: CalibrationOptions,
    inputs: Inputs,
    heldout: HeldoutInfo,
    tables: Tables,
    serving: ServingInfo,
    others: Sequence[Alternative],
) -> HeldoutInfo:
    """The held-out report with what each alternative would have done."""
    chosen = Alternative("", serving.mode, serving.lambda_, tables)
    differences = compare(model, inputs.heldout, chosen, others, options.seed)
    return heldout.model_copy(update={"alternatives": differences})


def _alternatives(
    model: MoeModel,
    options: CalibrationOptions,
    tables: Tables,
    serving: ServingInfo,
    impacts: Sequence[statistics.ExpertImpact],
    hard: Sequence[float],
    rki: Sequence[float],
) -> list[Alternative]:
    """Every setting one flag away that these measurements can give, the file's own left out."""
    mode, lam = serving.mode, serving.lambda_
    found = [
        Alternative(f"--cor-mode {other}", other, lam or DEFAULT_SERVING.lambda_, tables)
        for other in by_size()
        if other != mode and not MODES[other].random
    ]
    if has_lambda(mode):
        lams = (value for value in SWAP_RATE_LAMBDAS if value < lam)
        found += [Alternative(f"--cor-lambda {value:g}", mode, value, tables) for value in lams]
        other_cei = torch.stack([
            statistics.normalise(impact.raw if options.shrink else statistics.shrink(impact))
            for impact in impacts
        ])  # fmt: skip
        flag = "without --shrink" if options.shrink else "--shrink"
        found.append(Alternative(flag, mode, lam, Tables(tables.k, other_cei)))
    if MODES[mode].uses_budget:
        for intensity, values in (("ratio", rki), ("hard", hard)):
            if intensity != options.intensity:
                other = options.model_copy(update={"intensity": intensity})
                k, _ = budget(other, model.eligible_experts, model.top_k, values)
                found.append(Alternative(f"--intensity {intensity}", mode, lam, Tables(k, tables.cei)))
    return found


def _details(
    model: MoeModel,
    options: CalibrationOptions,
    inputs: Inputs,
    base: Baseline,
    measured: Sequence[LayerMeasurement],
) -> dict[str, Any]:
    """How far the numbers can be trusted: what `show` prints next to them, recorded under `calibration`."""
    impacts = [(m.active, m.ablation) for m in measured]
    details: dict[str, Any] = {
        "heldout_corpus": inputs.heldout_corpus if inputs.heldout else None,
        "mean_loss": base.losses.double().mean().item(),
        "sensitivity_hard_sem": [statistics.mean_and_sem(layer.hard)[1] for layer in measured],
        "sensitivity_easy_sem": [statistics.mean_and_sem(layer.easy)[1] for layer in measured],
        "rki_interval": [
            statistics.intensity_interval(m.hard, m.easy, options.epsilon, options.seed) for m in measured
        ],
        "cei_split_half": statistics.split_half_correlation(impacts, model.num_experts, options.seed),
        "cei_split_half_rank": statistics.split_half_correlation(
            impacts, model.num_experts, options.seed, ranks=True
        ),
    }
    if options.intensity == "marginal":
        details["marginal"] = [
            MarginalInfo(fewer=_estimate(layer.fewer), more=_estimate(layer.more)) for layer in measured
        ]
    return details


def versions() -> dict[str, str]:
    """The versions that a result's file names."""
    return {"cor-vllm": __version__, "torch": version("torch"), "transformers": version("transformers")}


def _estimate(changes: torch.Tensor | None) -> tuple[float, float] | None:
    return None if changes is None else statistics.mean_and_sem(changes)


def swap_rates(router: Router, router_logits: torch.Tensor, cei: torch.Tensor) -> torch.Tensor:
    """Share of the top_k slots of [P, N] router logits that λ·CEI fills otherwise than stock routing: [5]."""

    def chosen(bias: torch.Tensor | None) -> torch.Tensor:
        ids = router.route(router_logits, bias)[1].long()
        return torch.zeros_like(router_logits, dtype=torch.bool).scatter(1, ids, True)

    stock = chosen(None)
    shares = [(stock & ~chosen(lam * cei)).sum(1).double().mean() for lam in SWAP_RATE_LAMBDAS]
    return (torch.stack(shares) / router.top_k).float()


def _judge(
    model: MoeModel, options: CalibrationOptions, inputs: Inputs, tables: Tables
) -> tuple[HeldoutInfo | None, ServingInfo]:
    """The held-out check, and what the server is to use: the tuned setting or the defaults."""
    if not inputs.heldout:
        return None, DEFAULT_SERVING
    if not options.tune:
        lam = DEFAULT_SERVING.lambda_
        return check(
            model, inputs.heldout, tables, lam, options.hard_percentile, options.seed
        ), DEFAULT_SERVING
    best, candidates = tune(model, inputs.tuning, tables, options.seed)
    # If tuning found no λ worth using, the report still shows what the default would have done.
    lam = best.lam or DEFAULT_SERVING.lambda_
    report = check(model, inputs.heldout, tables, lam, options.hard_percentile, options.seed)
    trials = [Trial(mode=c.mode, difference=c.difference, sem=c.sem, **{"lambda": c.lam}) for c in candidates]
    tuning = TuningInfo(positions=_positions(inputs.tuning), trials=trials)
    tuned = report.model_copy(update={"tuning": tuning})
    return tuned, ServingInfo.model_validate({"lambda": best.lam, "mode": best.mode})


def _positions(sequences: Sequence[Sequence[int]]) -> int:
    return sum(len(ids) - 1 for ids in sequences)


def _calibration(
    model: MoeModel, options: CalibrationOptions, inputs: Inputs, strata: Strata, details: dict[str, Any]
) -> CalibrationInfo:
    values = options.record() | {
        "corpus": inputs.name,
        "corpus_sha256": inputs.sha256,
        "num_positions": _positions(inputs.sequences),
        "num_hard": int(strata.hard.sum()),
        "num_easy": int(strata.easy.sum()),
        "tau_high": strata.tau_high,
        "tau_low": strata.tau_low,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": model.device.type,
    }
    return CalibrationInfo(**values, **details)
