"""What the paper reports, in percent (arXiv 2604.14246, version of April 2026): Tables 1, 2, 3, 4 and 6.

Its numbers as they are printed there, even if its own arithmetic does not hold; docs/reproduction.md names
those cells. Table 5 is answers in words, and the values of Figures 4 to 6 are in the pictures alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

QWEN, DEEPSEEK, GPT_OSS = "Qwen3-30B-A3B", "DeepSeek-V2-Lite", "GPT-OSS-20B"
TELECHAT = "TeleChat3-105B-A4.7B-Thinking"

TRUTHFULQA = ("truthfulqa_mc1", "truthfulqa_mc2", "truthfulqa_gen")
FACTOR = ("factor_news", "factor_wiki")
FACTUAL = (*TRUTHFULQA, *FACTOR, "triviaqa")
GENERAL = (
    "arc_challenge", "arc_easy",
    "mmlu_humanities", "mmlu_social_sciences", "mmlu_stem", "mmlu_other", "gsm8k",
)  # fmt: skip

# A column of Table 4 that is a mean → the benchmarks that it is over, in equal parts.
MEANS = {"truthfulqa_mean": TRUTHFULQA, "factor_mean": FACTOR}


@dataclass(frozen=True)
class Row:
    """One line of a table: percentages in the order of its columns, and their mean if it is printed."""

    cells: tuple[float, ...]
    average: float | None = None


@dataclass(frozen=True)
class Table:
    """One table of the paper.

    Args:
        columns: names of benchmarks, as `--tasks` takes them, or keys of MEANS.
        rows: (model, condition) → row; conditions as `--conditions` takes them.
    """

    columns: tuple[str, ...]
    rows: Mapping[tuple[str, str], Row]


TABLES: dict[int, Table] = {
    1: Table(
        FACTUAL,
        {
            (QWEN, "standard"): Row((34.15, 53.27, 40.64, 65.35, 56.15, 38.49), 48.01),
            (QWEN, "random"): Row((30.42, 49.85, 36.20, 61.20, 52.30, 34.15), 44.02),
            (QWEN, "dola"): Row((34.38, 53.45, 40.92, 65.60, 56.10, 38.55), 48.17),
            (QWEN, "iti"): Row((34.22, 53.15, 40.50, 65.10, 56.25, 38.38), 47.93),
            (QWEN, "full"): Row((35.13, 54.81, 44.08, 67.80, 58.15, 39.70), 49.95),
            (DEEPSEEK, "standard"): Row((21.54, 31.88, 29.13, 56.21, 47.73, 42.25), 38.12),
            (DEEPSEEK, "random"): Row((18.30, 28.50, 25.40, 52.15, 44.20, 38.60), 34.53),
            (DEEPSEEK, "dola"): Row((21.10, 32.05, 28.95, 55.90, 47.50, 41.80), 37.88),
            (DEEPSEEK, "iti"): Row((21.65, 32.15, 29.20, 56.35, 47.60, 41.75), 38.12),
            (DEEPSEEK, "full"): Row((23.26, 43.61, 45.90, 58.01, 48.73, 41.89), 43.57),
            (GPT_OSS, "standard"): Row((34.03, 53.11, 19.20, 30.69, 34.87, 29.55), 33.58),
            (GPT_OSS, "random"): Row((31.50, 50.20, 16.80, 28.10, 32.40, 26.80), 30.97),
            (GPT_OSS, "dola"): Row((34.60, 53.55, 19.85, 31.05, 34.62, 30.15), 33.97),
            (GPT_OSS, "iti"): Row((34.45, 53.40, 20.10, 30.85, 34.95, 29.90), 33.94),
            (GPT_OSS, "full"): Row((36.32, 54.73, 21.55, 31.82, 35.32, 33.21), 35.49),
        },
    ),
    2: Table(
        FACTUAL,
        {
            (QWEN, "standard"): Row((34.15, 53.27, 40.64, 65.35, 56.15, 38.49), 48.01),
            (QWEN, "layer"): Row((34.35, 53.58, 41.42, 65.80, 56.55, 38.82), 48.42),
            (QWEN, "expert"): Row((34.78, 54.25, 42.90, 66.95, 57.40, 39.35), 49.27),
            (QWEN, "full"): Row((35.13, 54.81, 44.08, 67.80, 58.15, 39.70), 49.95),
        },
    ),
    3: Table(
        GENERAL,
        {
            (QWEN, "standard"): Row((52.73, 79.88, 67.69, 87.49, 78.91, 81.69, 86.43), 76.40),
            (QWEN, "random"): Row((45.15, 72.52, 60.25, 78.61, 70.52, 73.46, 75.20), 67.96),
            (QWEN, "full"): Row((53.24, 79.48, 67.44, 87.55, 78.88, 81.30, 87.23), 76.45),
            (DEEPSEEK, "standard"): Row((43.65, 76.09, 44.95, 58.47, 44.15, 56.16, 20.02), 49.07),
            (DEEPSEEK, "random"): Row((38.22, 68.46, 40.17, 52.33, 39.57, 50.24, 15.42), 43.49),
            (DEEPSEEK, "full"): Row((43.82, 75.84, 45.16, 58.26, 43.95, 56.53, 17.52), 48.73),
            (GPT_OSS, "standard"): Row((45.22, 77.46, 45.08, 65.75, 49.51, 71.03, 36.16), 55.74),
            (GPT_OSS, "random"): Row((40.56, 71.52, 39.85, 59.46, 44.21, 65.52, 30.12), 50.18),
            (GPT_OSS, "full"): Row((44.87, 77.55, 45.12, 65.23, 48.43, 71.15, 34.56), 55.27),
        },
    ),
    4: Table(
        (*MEANS, "triviaqa"),
        {
            (QWEN, "standard"): Row((42.67, 60.75, 38.49)),
            (QWEN, "dola"): Row((42.91, 60.85, 38.55)),
            (QWEN, "full"): Row((44.67, 62.98, 39.70)),
            (QWEN, "full-dola"): Row((45.15, 63.25, 39.92)),
        },
    ),
    6: Table(
        (*TRUTHFULQA, "triviaqa"),
        {
            (TELECHAT, "standard"): Row((35.12, 53.86, 41.53, 39.95)),
            (TELECHAT, "full"): Row((36.58, 54.79, 42.71, 41.62)),
        },
    ),
}


def of(model: str, condition: str) -> dict[str, float]:
    """What the paper prints for a model under a condition: benchmark → percent; empty if it has nothing.

    Args:
        model: a hub id or a folder. Its last part must be the name of a model of the paper, in upper or lower
            case; other versions (`…-Instruct-2507`, `…-Chat`, `…-FP8`) are other models.
        condition: as `--conditions` takes it.
    """
    name = model.rstrip("/").split("/")[-1].lower()
    found: dict[str, float] = {}
    for table in TABLES.values():
        for (of_model, of_condition), row in table.rows.items():
            if (of_model.lower(), of_condition) == (name, condition):
                cells = zip(table.columns, row.cells, strict=True)
                found |= {column: cell for column, cell in cells if column not in MEANS}
    return found
