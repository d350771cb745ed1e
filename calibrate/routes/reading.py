"""Reads a text with a progress bar, and refuses a model whose numbers mean nothing."""

from rich.console import Console

from cor_vllm.calibrate.interventions.checks import check_baseline
from cor_vllm.calibrate.interventions.measurement import Baseline
from cor_vllm.calibrate.model.batches import sequence_batches
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.routes.standard import LastInputs, ScoredText, read_standard
from cor_vllm.calibrate.routes.utilities import Standard
from cor_vllm.commands.console import progress_bar


def read(
    model: MoeModel, text: ScoredText, seed: int, nulls: int, console: Console
) -> tuple[Standard, LastInputs | None]:
    """`read_standard` with a bar on the console.

    Raises:
        CalibrationError: logits are not finite, or a router chooses the same experts for every token.
    """
    with progress_bar(console) as progress:
        total = sum(len(group) * max(map(len, group)) for group in sequence_batches(text.sequences))
        task = progress.add_task("reading", total=total * len(model.decoder_layers), step="the text")
        standard, last = read_standard(model, text, seed, nulls, lambda rows: progress.advance(task, rows))
    scored = [
        [ids[t], ids[t + 1]] for ids, at in zip(text.sequences, text.positions, strict=True) for t in at
    ]
    check_baseline(model, Baseline(-standard.log_prob[:, 0], standard.router_logits), scored)
    return standard, last
