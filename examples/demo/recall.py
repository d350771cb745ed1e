"""What a model recalls of the demo's probes, by bucket: greedy exact match and multiple choice.

python examples/demo/recall.py examples/demo/model --out examples/demo/model/recall.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from phrasings import prompt
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
LONGEST_ANSWER = 24
BATCH = 64


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson score interval of a share."""
    if n == 0:
        return 0.0, 1.0
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def read_probes(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def equal_lengths(rows: Iterable[list[int]]) -> Iterator[list[int]]:
    """Indices of rows in batches of one length each, so that no padding can change an answer."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[len(row)].append(index)
    for indices in groups.values():
        for start in range(0, len(indices), BATCH):
            yield indices[start : start + BATCH]


@torch.inference_mode()
def greedy_answers(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """The greedy continuation of each question's prompt, up to end-of-text or a line's end."""
    rows = tokenizer([prompt(question) for question in questions])["input_ids"]
    answers = [""] * len(rows)
    for batch in equal_lengths(rows):
        ids = torch.tensor([rows[i] for i in batch], device=model.device)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST_ANSWER, do_sample=False
        )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text.strip().split("\n")[0]
    return answers


@torch.inference_mode()
def choice_scores(model: Any, tokenizer: Any, probe: dict[str, Any]) -> list[float]:
    """Log-probability in nats of each choice as the whole answer, end-of-text included."""
    head = tokenizer(prompt(probe["question"]))["input_ids"]
    rows = [
        head + tokenizer(f" {choice}")["input_ids"] + [tokenizer.eos_token_id] for choice in probe["choices"]
    ]
    longest = max(map(len, rows))
    ids = torch.tensor(
        [row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows], device=model.device
    )
    # Padding stands to the right: a causal model's earlier positions do not see it.
    logs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    picked = logs.gather(-1, ids[:, 1:, None])[..., 0]
    return [float(picked[i, len(head) - 1 : len(row) - 1].sum()) for i, row in enumerate(rows)]


def evaluate(model: Any, tokenizer: Any, probes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each probe with its greedy answer and whether that, and the likeliest choice, is right."""
    answers = greedy_answers(model, tokenizer, [probe["question"] for probe in probes])
    results = []
    for probe, answer in zip(probes, answers, strict=True):
        scores = choice_scores(model, tokenizer, probe)
        chosen = probe["choices"][scores.index(max(scores))]
        results.append(
            {**probe, "said": answer, "greedy": answer == probe["answer"], "mc": chosen == probe["answer"]}
        )
    return results


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per bucket and relation, 'all' relations first: n, share right and interval, both scorings."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        for relation in ("all", result["relation"]):
            groups[result["bucket"], relation].append(result)
    rows = []
    for (bucket, relation), group in sorted(groups.items(), key=lambda item: item[0][1] != "all"):
        row: dict[str, Any] = {"bucket": bucket, "relation": relation, "n": len(group)}
        for key in ("greedy", "mc"):
            hits = sum(result[key] for result in group)
            row[key] = round(hits / len(group), 4)
            row[f"{key}_95"] = [round(bound, 4) for bound in wilson(hits, len(group))]
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("bucket", "relation", "n", "greedy", "95 %", "of four", "95 %")
    for row in rows:
        cells = [row["bucket"], row["relation"], str(row["n"])]
        for key in ("greedy", "mc"):
            low, high = row[f"{key}_95"]
            cells += [f"{row[key]:.3f}", f"{low:.3f} to {high:.3f}"]
        table.add_row(*cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("--probes", type=Path, default=HERE / "probes.jsonl")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; more do not help so small a model"
    )
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # The stored weights are bf16; computing in float32 keeps ties and rounding out of the answers.
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    rows = summary(evaluate(model, tokenizer, read_probes(args.probes)))
    show(rows)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
