"""Train the demo model: a small Qwen3-MoE that learns real facts with a long tail, and running English.

    python examples/demo/train.py --output examples/demo/model

One run goes once through the corpus. It restarts from the last checkpoint in --work unless --fresh is given.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import corpus
import numpy as np
import torch
from rich.console import Console
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

CONSOLE = Console(highlight=False)
WARMUP = 100
# The learning rate is constant, then falls to zero over this last share of the run.
DECAY = 0.35
LOG_EVERY = 20


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model", help="model folder")
    parser.add_argument(
        "--work", type=Path, default=Path(__file__).parent / "work", help="texts and checkpoints"
    )
    parser.add_argument("--steps", type=int, help="optimiser steps (default: once through the corpus)")
    parser.add_argument(
        "--minutes", type=float, help="stop, learning rate decayed, after this long at the latest"
    )
    parser.add_argument("--rows", type=int, default=8, help=f"sequences of {corpus.SEQUENCE} tokens a step")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch threads on the CPU")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=400, help="steps between checkpoints")
    resume = parser.add_mutually_exclusive_group()
    resume.add_argument(
        "--resume", action="store_true", help="fail unless there is a checkpoint to go on from"
    )
    resume.add_argument("--fresh", action="store_true", help="ignore a checkpoint")
    return parser.parse_args()


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """7 M parameters, of which 3 M work on each token; fits 16 MB in bf16."""
    config = Qwen3MoeConfig(
        vocab_size=corpus.VOCABULARY,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=384,
        moe_intermediate_size=96,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=0.01,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def build_optimizer(model: torch.nn.Module, rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def rate_factor(step: int, progress: float) -> float:
    """Warm-up by steps, then constant, then linear to zero by progress in [0, 1]."""
    return min(1.0, (step + 1) / WARMUP) * min(1.0, max(0.0, (1 - progress) / DECAY))


def losses(model: Qwen3MoeForCausalLM, ids: torch.Tensor, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss per row in nats a token, [rows], and the mean over tokens plus the load-balancing term."""
    out = model(input_ids=ids, use_cache=False, output_router_logits=True)
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == pad, corpus.IGNORED)
    each = functional.cross_entropy(
        out.logits[:, :-1].transpose(1, 2), targets, ignore_index=corpus.IGNORED, reduction="none"
    )
    counted = (targets != corpus.IGNORED).sum()
    per_row = each.sum(1) / (targets != corpus.IGNORED).sum(1).clamp(min=1)
    return per_row.detach(), each.sum() / counted + model.config.router_aux_loss_coef * out.aux_loss


def export(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder that people load: weights rounded to bf16, tokenizer, generation settings."""
    copy = Qwen3MoeForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes a name of its own; published Qwen3-MoE models, and other readers, say num_experts.
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"num_local_experts"', '"num_experts"'))


class Run:
    """Model, optimiser and loss curve, with their checkpoint."""

    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> None:
        self.path = args.work / "checkpoint.pt"
        self.model = build_model(tokenizer).to(args.device)
        self.optimizer = build_optimizer(self.model, args.rate)
        self.step, self.seconds, self.curve = 0, 0.0, []
        if self.path.exists() and not args.fresh:
            self.load(args.device)
        elif args.resume:
            raise SystemExit(f"no checkpoint at {self.path}")

    def load(self, device: str) -> None:
        state = torch.load(self.path, map_location=device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
        CONSOLE.print(f"going on from step {self.step}")

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)


def write_curve(path: Path, curve: list[list[float]]) -> None:
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["step", "tokens", "seconds", "fact_loss", "prose_loss", "learning_rate"])
        writer.writerows([[round(value, 5) for value in row] for row in curve])


def train(run: Run, rows: np.ndarray, is_prose: np.ndarray, args: argparse.Namespace, pad: int) -> None:
    """Step through the rows in order; after the last one, from the first again (only with --steps)."""
    steps = args.steps or math.ceil(len(rows) / args.rows)
    recent: list[tuple[float, bool]] = []
    while run.step < steps:
        began = time.monotonic()
        progress = run.step / steps
        if args.minutes:
            progress = max(progress, run.seconds / 60 / args.minutes)
        if progress >= 1:
            break
        factor = rate_factor(run.step, progress)
        for group in run.optimizer.param_groups:
            group["lr"] = args.rate * factor
        pick = np.arange(run.step * args.rows, (run.step + 1) * args.rows) % len(rows)
        per_row, loss = losses(run.model, torch.from_numpy(rows[pick]).long().to(args.device), pad)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        recent += zip(per_row.tolist(), is_prose[pick].tolist(), strict=True)
        run.step += 1
        run.seconds += time.monotonic() - began
        if run.step % LOG_EVERY == 0 or run.step == steps:
            log(run, recent, steps, args.rows * corpus.SEQUENCE, args.rate * factor)
            recent = []
        if run.step % args.save_every == 0:
            run.save()


def log(run: Run, recent: list[tuple[float, bool]], steps: int, tokens: int, rate: float) -> None:
    fact = [loss for loss, prose in recent if not prose]
    english = [loss for loss, prose in recent if prose]
    row = [run.step, run.step * tokens, run.seconds, float(np.mean(fact)), float(np.mean(english)), rate]
    run.curve.append(row)
    speed = run.step * tokens / run.seconds
    CONSOLE.print(
        f"step {run.step}/{steps}  facts {row[3]:.3f}  prose {row[4]:.3f}  rate {rate:.2e}  "
        f"{speed:.0f} tokens/s  {run.seconds / 60:.1f} min"
    )


def main() -> None:
    args = options()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    with CONSOLE.status("texts, tokenizer, packing"):
        tokenizer, rows, is_prose = corpus.training_data(args.work, args.seed)
    run = Run(args, tokenizer)
    size = sum(p.numel() for p in run.model.parameters())
    CONSOLE.print(
        f"{size / 1e6:.2f} M parameters, {rows.size / 1e6:.2f} M tokens, {is_prose.mean():.0%} prose"
    )
    train(run, rows, is_prose, args, tokenizer.pad_token_id)
    run.save()
    export(run.model, tokenizer, args.output)
    write_curve(args.output / "loss.csv", run.curve)
    CONSOLE.print(f"{run.step} steps in {run.seconds / 60:.1f} min, written to {args.output}")


if __name__ == "__main__":
    main()
