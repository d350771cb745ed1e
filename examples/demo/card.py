"""Write the measured parts of the model card: the loss curve's picture and the recall table.

    python examples/demo/card.py examples/demo/model

Reads loss.csv (train.py) and recall.json (recall.py --out) in the model folder; the table goes between the
markers of its README.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

MARKS = ("<!-- recall -->", "<!-- end of recall -->")


def plot_losses(source: Path, picture: Path) -> None:
    """Fact and prose loss in nats a token over training tokens."""
    with source.open() as handle:
        rows = list(csv.DictReader(handle))
    tokens = [float(row["tokens"]) / 1e6 for row in rows]
    figure, axes = pyplot.subplots(figsize=(6, 3.2), dpi=100)
    for key, label in (("prose_loss", "prose"), ("fact_loss", "facts")):
        axes.plot(tokens, [float(row[key]) for row in rows], label=label, linewidth=1.2)
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(picture, metadata={"Software": None})


def recall_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| bucket | relation | n | greedy exact match (95 %) | right of four (95 %) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row["bucket"], row["relation"], str(row["n"])]
        for key in ("greedy", "mc"):
            low, high = row[f"{key}_95"]
            cells.append(f"{row[key]:.3f} ({low:.3f} to {high:.3f})")
        if row["relation"] == "all":
            cells = [f"**{cell}**" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder")
    folder = parser.parse_args().model
    plot_losses(folder / "loss.csv", folder / "loss.png")
    table = recall_table(json.loads((folder / "recall.json").read_text()))
    card = folder / "README.md"
    start, end = MARKS
    text, found = re.subn(
        f"{start}.*?{end}",
        lambda _: f"{start}\n{table}\n{end}",
        card.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    if found != 1:
        raise SystemExit(f"{card} must hold {start} and {end} once")
    card.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
