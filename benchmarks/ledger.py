"""The paper's tables in docs/reproduction.md, out of cor_vllm/evaluate/paper.py.

    python -m benchmarks.ledger

writes them between the marks `<!-- NAME -->` and `<!-- end -->`; a test holds the page against this.
"""

import re
from decimal import Decimal
from pathlib import Path

from cor_vllm.evaluate.paper import MEANS, TABLES

PAGE = Path(__file__).parents[1] / "docs" / "reproduction.md"
TITLES = {
    "truthfulqa_mc1": "MC1", "truthfulqa_mc2": "MC2", "truthfulqa_gen": "Gen", "factor_news": "News",
    "factor_wiki": "Wiki", "triviaqa": "TriviaQA", "arc_challenge": "ARC-C", "arc_easy": "ARC-E",
    "mmlu_humanities": "MMLU Human", "mmlu_social_sciences": "MMLU Social", "mmlu_stem": "MMLU STEM",
    "mmlu_other": "MMLU Others", "gsm8k": "GSM8K", "truthfulqa_mean": "TruthfulQA", "factor_mean": "FACTOR",
}  # fmt: skip
ROWS = {
    "standard": "Standard", "random": "Random", "dola": "DoLa", "iti": "ITI", "full": "CoR",
    "layer": "Layer-wise", "expert": "Expert-wise", "full-dola": "CoR + DoLa",
}  # fmt: skip
ROUNDING = Decimal("0.005")  # what rounding to two decimals may move


def exact(value: float) -> Decimal:
    """A percentage as it is printed, two decimals."""
    return Decimal(f"{value:.2f}")


def mean(values: list[Decimal]) -> Decimal:
    """The mean of percentages, unrounded."""
    return sum(values, Decimal()) / len(values)


def departures() -> list[tuple[int, str, str, str, Decimal, Decimal]]:
    """Printed means that are not the mean of the printed cells, to the rounding of the mean.

    Returns:
        (table, model, condition, column, what is printed, the mean of the cells), in the paper's order. The
        cells of Table 4's means are those of Table 1.
    """
    found = []
    for number, table in TABLES.items():
        for (model, condition), row in table.rows.items():
            cells = dict(zip(table.columns, map(exact, row.cells), strict=True))
            means = {}
            if row.average is not None:
                means["average"] = (exact(row.average), list(cells.values()))
            first = TABLES[1].rows.get((model, condition))
            for column in cells.keys() & MEANS.keys() if first else ():
                parts = dict(zip(TABLES[1].columns, map(exact, first.cells), strict=True))
                means[column] = (cells[column], [parts[name] for name in MEANS[column]])
            for column, (printed, values) in sorted(means.items()):
                if abs(printed - mean(values)) > ROUNDING:
                    found.append((number, model, condition, column, printed, mean(values)))
    return found


def table_text(number: int) -> str:
    """One table of the paper as Markdown, with the state of its reproduction in the last column."""
    table = TABLES[number]
    averaged = any(row.average is not None for row in table.rows.values())
    head = ["model", "row", "condition", *(TITLES[column] for column in table.columns)]
    lines = [[*head, *(["average"] if averaged else []), "here"]]
    lines.append(["---"] * len(lines[0]))
    for (model, condition), row in table.rows.items():
        cells = [f"{cell:.2f}" for cell in row.cells]
        average = [] if row.average is None else [f"{row.average:.2f}"]
        lines.append([model, ROWS[condition], f"`{condition}`", *cells, *average, "not run"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def departures_text() -> str:
    """The printed means that do not follow from the printed cells, as a list."""
    lines = [
        f"- Table {number}, {model}, {ROWS[condition]}, {TITLES[column]}: printed {printed}, the mean of the "
        f"cells is {middle:.3f}."
        for number, model, condition, column, printed, middle in departures()
    ]
    return "\n".join(lines) or "There are none."


def gains_text() -> str:
    """CoR's average less Standard's, in points, by model: Tables 1 and 3."""
    factual, general = gains(1), gains(3)
    lines = ["| model | factuality (Table 1) | general ability (Table 3) |", "| --- | --- | --- |"]
    lines += [f"| {model} | {factual[model]:+.2f} | {general[model]:+.2f} |" for model in factual]
    means = [f"{mean(list(table.values())):+.2f}" for table in (factual, general)]
    return "\n".join([*lines, f"| mean of the three | {' | '.join(means)} |"])


def gains(number: int) -> dict[str, Decimal]:
    """Model → the average of `full` less that of `standard`, as printed, in a table with averages."""
    averages = {key: row.average for key, row in TABLES[number].rows.items() if row.average is not None}
    models = dict.fromkeys(model for model, _ in averages)
    return {m: exact(averages[m, "full"]) - exact(averages[m, "standard"]) for m in models}


def updated(page: str) -> str:
    """The page with every marked block written anew; KeyError for a mark that has no text."""
    texts = {f"table {number}": table_text(number) for number in TABLES}
    texts |= {"departures": departures_text(), "gains": gains_text()}

    def block(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{texts[found[1]]}\n<!-- end -->"

    return re.sub(r"<!-- (?!end -->)(.+?) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
