"""Measures how far CEI from a small text can be trusted, with and without --shrink, also in bfloat16.

    python -m benchmarks.shrink --model examples/demo/model --corpus examples/demo/calibration.txt

Disjoint draws of calibration text each give CEI by the sweep, raw and shrunk. Both are correlated with the
CEI of a much larger draw, and compared by the loss on held-out positions under `expert` routing. The
correlation is Pearson's, with layer means removed, because a constant within a layer changes no routing.
Differences are paired: by draw for the correlation; for the loss by draw and, averaged over the draws, by
position. The larger draw is itself noisy.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.common.results import device_name, write_rows
from cor_vllm.calibrate.config import CalibrationOptions
from cor_vllm.calibrate.interventions.measurement import baseline
from cor_vllm.calibrate.interventions.sweep import Sweep
from cor_vllm.calibrate.model.loading import load_model
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.result import statistics
from cor_vllm.calibrate.result.heldout import Tables, position_losses, rules
from cor_vllm.calibrate.text.corpus import draw, load_corpus
from cor_vllm.calibrate.text.stratify import stratify

LAMBDA = 0.1
Sequences = list[list[int]]


@dataclass(frozen=True, eq=False)
class Cei:
    """The normalised CEI of one draw, [M, N] each."""

    raw: torch.Tensor
    shrunk: torch.Tensor


def calibrate(model: MoeModel, sequences: Sequences) -> Cei:
    """CEI by the sweep, with the default options."""
    base = baseline(model, sequences)
    strata = stratify(base.losses, 90, 10)
    options = CalibrationOptions(model="benchmark", output=Path("none"))
    sweep = Sweep(model, options, sequences, base, strata)
    for step in range(len(sweep.work())):
        sweep.step(step)
    impacts = [statistics.expert_impact(m.active, m.ablation, model.num_experts) for m in sweep.result()]
    return Cei(
        torch.stack([statistics.normalise(impact.raw) for impact in impacts]),
        torch.stack([statistics.normalise(statistics.shrink(impact)) for impact in impacts]),
    )


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Pearson correlation over [M, N], with layer means removed."""
    first, second = ((x - x.mean(dim=1, keepdim=True)).double().flatten() for x in (one, other))
    return (first @ second / (first.norm() * second.norm())).item()


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman correlation within each layer of [M, N], averaged over layers; equal values rank in order."""
    ranks = [values.argsort(dim=1).argsort(dim=1).float() for values in (one, other)]
    return correlation(*ranks)


def expert_loss(model: MoeModel, heldout: Sequences, cei: torch.Tensor) -> torch.Tensor:
    """[P] float64 losses under `expert` routing."""
    tables = Tables([model.top_k] * model.num_layers, cei)
    return position_losses(model, heldout, [rules(model, tables, "expert", LAMBDA, 0)])[0].double()


def compare(
    model: MoeModel, half: MoeModel | None, draws: list[Sequences], reference: Cei, heldout: Sequences
) -> tuple[list[dict[str, float]], torch.Tensor]:
    """One row of numbers per draw, and the losses' difference shrunk − raw by draw and position."""
    stock = position_losses(model, heldout, [{}])[0].double()
    rows, differences = [], []
    for number, sequences in enumerate(draws):
        cei = calibrate(model, sequences)
        other = calibrate(half, sequences) if half else None
        raw, shrunk = (expert_loss(model, heldout, values) for values in (cei.raw, cei.shrunk))
        differences.append(shrunk - raw)
        rows.append({
            "draw": number,
            "correlation_raw": correlation(cei.raw, reference.raw),
            "correlation_shrunk": correlation(cei.shrunk, reference.raw),
            "correlation_shrunk_with_shrunk": correlation(cei.shrunk, reference.shrunk),
            "layers_shrunk_to_zero": int((cei.shrunk == 0).all(dim=1).sum()),
            "raw_minus_stock": (raw - stock).mean().item(),
            "shrunk_minus_stock": (shrunk - stock).mean().item(),
            "shrunk_minus_raw": (shrunk - raw).mean().item(),
            "shrunk_minus_raw_sem": statistics.mean_and_sem(shrunk - raw)[1],
        } | ({
            "bfloat16_rank_correlation": rank_correlation(cei.raw, other.raw),
            "bfloat16_correlation": correlation(cei.raw, other.raw),
        } if other else {}))  # fmt: skip
    return rows, torch.stack(differences)


def print_summary(rows: list[dict[str, float]], differences: torch.Tensor, console: Console) -> None:
    """Mean over the draws with its standard error, then the paired differences."""

    def column(name: str) -> torch.Tensor:
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    table = Table("over the draws", "mean", "± s.e.", "lowest", "highest")
    measured = {name: column(name) for name in rows[0] if name not in ("draw", "shrunk_minus_raw_sem")}
    gain = "correlation_shrunk − correlation_raw"
    measured[gain] = measured["correlation_shrunk"] - measured["correlation_raw"]
    for name, values in measured.items():
        numbers = (*statistics.mean_and_sem(values), values.min().item(), values.max().item())
        table.add_row(name, *(f"{number:.4f}" for number in numbers))
    console.print(table)
    mean, sem = statistics.mean_and_sem(differences.mean(dim=0))
    console.print(
        f"shrunk − raw on held-out text, mean of the draws: {mean:+.5f} ± {sem:.5f} nats over positions"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", default="default", help="as for cor-vllm calibrate")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=1000, help="positions of a draw")
    parser.add_argument("--reference", type=int, default=20_000, help="positions of the large draw")
    parser.add_argument("--heldout", type=int, default=4000, help="held-out positions")
    parser.add_argument("--bfloat16", action="store_true", help="measure in bfloat16, too; slow on most CPUs")
    args = parser.parse_args()
    model = load_model(args.model, "float32", None)
    half = load_model(args.model, "bfloat16", None) if args.bfloat16 else None
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    parts = [args.heldout, args.reference, *[args.tokens] * args.draws]
    corpus = load_corpus(args.corpus)

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    heldout, large, *draws = draw(corpus, tokenize, [], 256, parts, 0)
    rows, differences = compare(model, half, draws, calibrate(model, large), heldout)
    run = {
        "model": args.model.resolve().name, "corpus": corpus.name, "tokens": args.tokens,
        "reference": args.reference, "heldout": args.heldout, "lambda": LAMBDA,
    }  # fmt: skip
    console = Console(width=150)
    print_summary(rows, differences, console)
    path = write_rows("shrink", [row | run for row in rows], device_name(model.device.type))
    console.print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
