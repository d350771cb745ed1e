"""Writes the results of all benchmarks: CSV rows with device, versions and date, and Markdown tables."""

import csv
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("cor-vllm", "vllm", "torch", "triton", "transformers", "accelerate")


def write_rows(name: str, rows: Sequence[Mapping[str, Any]], device: str, folder: Path | None = None) -> Path:
    """Write rows as CSV, each with where and when it was measured.

    Args:
        name: the table's name.
        rows: columns may differ between rows; a row's own column wins over one that `where` adds.
        device: what was measured, as `device_name()` gives it.
        folder: the folder of `<name>.csv`; if None, the file is `benchmarks/results/<name>-<date>.csv`.

    Returns:
        The file.
    """
    now = datetime.now(UTC)
    path = folder / f"{name}.csv" if folder else RESULTS / f"{name}-{now:%Y%m%d-%H%M%S}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    around = where(device, now)
    columns = dict.fromkeys(column for row in rows for column in row) | dict.fromkeys(around)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows([around | dict(row) for row in rows])
    return path


def run_folder(kind: str) -> Path:
    """The folder benchmarks/results/<device>-<date>, for a program that writes several tables."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(kind).lower()).strip("-")
    return RESULTS / f"{slug}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def where(device: str, now: datetime) -> dict[str, Any]:
    """The columns that every row gets: date, device, cores, load and versions."""
    return {
        "date": now.isoformat(timespec="seconds"),
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Versions of those PACKAGES that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(kind: str) -> str:
    """The name of the GPU for "cuda", else of the processor, as Linux gives it."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table with aligned columns, readable in a terminal too."""
    if not rows:
        return "(no rows)"
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([text(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in cells
    ]
    lines.insert(1, f"| {' | '.join('-' * width for width in widths)} |")
    return "\n".join(lines)


def text(value: Any) -> str:
    """Write a cell: floats with four significant digits, None as an empty text."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
