"""The tables of docs/results.md, out of the item scores that are committed beside them.

    python -m benchmarks.evaluation benchmarks/results/evaluation/smollm2.csv.xz
    python -m benchmarks.evaluation DIR --pack FILE.csv.xz    # after `cor-vllm evaluate --output DIR`

One table per benchmark, one row per condition: difference to `standard` on the same items in accuracy
(points), in the right answer's log-likelihood (nats) and in the margin (that less the mean of the wrong
answers'), with 95 % bootstrap intervals over items and uncorrected p. Rows that only differ in a number, of
permutations (`-permuted-0`) or of draws (`@answers0`), also have their mean. The last table takes
calibrations and permutations as the sample: do the conditions of `--draws` score higher than all those of
`--controls`? Its p is Mann and Whitney's, exact.
"""

import argparse
import csv
import lzma
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from cor_vllm.evaluate import runs
from cor_vllm.evaluate.conditions import STANDARD
from cor_vllm.evaluate.statistics import compare, item_means, mean

QUANTITIES = {"score": 100, "gold": 1, "margin": 1}  # and what each is multiplied by
TITLES = {"score": "accuracy, points", "gold": "right answer, nats", "margin": "margin, nats"}
Scores = dict[str, float]  # item → value
Table = dict[tuple[str, str, str], Scores]  # condition, benchmark, quantity


def read(path: Path) -> Table:
    """A folder of runs or a packed file."""
    return read_folder(path) if path.is_dir() else read_pack(path)


def read_folder(folder: Path) -> Table:
    """What `cor-vllm evaluate --output FOLDER` left."""
    return {
        (run.condition, benchmark, quantity): items
        for run in map(runs.load, sorted(folder.glob("*.json")))
        for benchmark, column in run.benchmarks.items()
        for quantity, items in column.items.items()
    }


def read_pack(path: Path) -> Table:
    """What `write_pack` wrote."""
    table: Table = {}
    with lzma.open(path, "rt", encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            key = (row["condition"], row["benchmark"], row["quantity"])
            table.setdefault(key, {})[row["item"]] = float(row["value"])
    return table


def write_pack(path: Path, table: Table) -> None:
    """One row per condition, benchmark, quantity and item, values to 4 decimals."""
    with lzma.open(path, "wt", encoding="utf-8", newline="", preset=9) as lines:
        writer = csv.writer(lines)
        writer.writerow(["condition", "benchmark", "quantity", "item", "value"])
        for key, items in table.items():
            writer.writerows([*key, item, f"{value:.4f}"] for item, value in items.items())


def with_means(table: Table) -> Table:
    """The table and, for conditions that differ in a permutation's or a draw's number, their mean by item."""
    alike: dict[tuple[str, str, str], list[Scores]] = {}
    for (condition, benchmark, quantity), items in table.items():
        name = re.sub(r"(-permuted)-\d+|(@[a-z]+)\d+$", r"\1\2", condition)
        if name != condition:
            alike.setdefault((name, benchmark, quantity), []).append(items)
    means = {
        (f"{name}, mean of {len(each)}", benchmark, quantity): item_means(each)
        for (name, benchmark, quantity), each in alike.items()
        if len(each) > 1
    }
    return table | means


def differences(table: Table, reference: str) -> str:
    """A Markdown table per benchmark: every condition against the reference."""
    parts = []
    for benchmark in dict.fromkeys(benchmark for _, benchmark, _ in table):
        base = {quantity: table.get((reference, benchmark, quantity)) for quantity in QUANTITIES}
        shown = {quantity: items for quantity, items in base.items() if items is not None}
        if not shown:
            continue
        titles = [TITLES[quantity] for quantity in shown]
        lines = ["| routing | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
        for condition in sorted({name for name, of, _ in table if of == benchmark}, key=_place):
            cells = [_cell(table[condition, benchmark, q], shown[q], QUANTITIES[q]) for q in shown]
            lines.append(f"| `{condition}` | " + " | ".join(cells) + " |")
        parts.append(f"{benchmark}, {len(shown['score'])} items\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _place(condition: str) -> tuple[bool, str, str]:
    """Standard first, and what is permuted beside what it was before."""
    return condition != STANDARD, re.sub(r"-permuted(-\d+)?|\d*(, mean.*)?$", "", condition), condition


def _cell(items: Scores, base: Scores, scale: int) -> str:
    if items is base:
        return _signed(f"{mean(items) * scale:.2f}")
    found = compare(items, base)
    low, high = found.low * scale, found.high * scale
    p = "p < 0.001" if found.p < 0.001 else f"p {found.p:.3f}"
    return _signed(f"{found.difference * scale:+.2f} [{low:+.2f}, {high:+.2f}], {p}")


def _signed(text: str) -> str:
    return text.replace("-", "−")


def against_all(table: Table, draws: Sequence[str], controls: str) -> str:
    """Calibrations as the sample: the conditions of `draws` against those of `controls`, by rank."""
    from scipy.stats import mannwhitneyu

    lines = [
        "| benchmark | quantity | draws | mean, lowest | permutations | mean, highest | p, two-sided |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for benchmark, quantity in [(b, q) for condition, b, q in table if condition == STANDARD]:
        scale = QUANTITIES[quantity]
        base = mean(table[STANDARD, benchmark, quantity]) * scale
        shifts = {
            condition: mean(items) * scale - base
            for (condition, *of), items in table.items()
            if of == [benchmark, quantity]
        }
        ours = list(_matching(shifts, draws))
        theirs = list(_matching(shifts, [controls]))
        if len(ours) > 1 and len(theirs) > 1:
            p = mannwhitneyu(ours, theirs, method="exact").pvalue
            lines.append(
                f"| {benchmark} | {quantity} | {len(ours)} | "
                + _signed(f"{sum(ours) / len(ours):+.2f}, {min(ours):+.2f} | {len(theirs)} | ")
                + _signed(f"{sum(theirs) / len(theirs):+.2f}, {max(theirs):+.2f} | {p:.4f} |")
            )
    return "\n".join(lines) if len(lines) > 2 else "No several draws and permutations to compare."


def _matching(shifts: dict[str, float], patterns: Sequence[str]) -> Iterator[float]:
    for condition, shift in shifts.items():
        if any(fnmatchcase(condition, pattern) for pattern in patterns):
            yield shift


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("runs", type=Path, help="a file that --pack wrote, or evaluate's --output folder")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write the folder's items there, and stop")
    parser.add_argument("--without", type=Path, metavar="RUNS", help="leave out the items that these have")
    parser.add_argument("--reference", default=STANDARD, help="the row that the others are held against")
    parser.add_argument("--draws", nargs="+", default=["expert@answers[0-9]"])
    parser.add_argument("--controls", default="expert-permuted-[0-9]*")
    args = parser.parse_args()
    table = read(args.runs)
    if args.pack:
        write_pack(args.pack, table)
        print(f"{args.pack}: {len(table)} columns, {args.pack.stat().st_size:,} bytes")
        return
    if args.without:
        seen = {item for items in read(args.without).values() for item in items}
        kept = {key: {i: v for i, v in items.items() if i not in seen} for key, items in table.items()}
        table = {key: items for key, items in kept.items() if items}
    print(differences(with_means(table), args.reference))
    print("\n" + against_all(table, args.draws, args.controls))


if __name__ == "__main__":
    main()
