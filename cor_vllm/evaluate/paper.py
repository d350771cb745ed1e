"""What the paper reports, as far as its numbers are known here, in percent (arXiv 2604.14246).

Only figures that were read are in; the rest of the paper's tables is missing, not zero. docs/reproduction.md
says which cells those are.
"""

PAPER: dict[str, dict[str, dict[str, float]]] = {
    # model → condition → benchmark → percent
    "Qwen3-30B-A3B": {
        "standard": {
            "truthfulqa_mc1": 34.15, "truthfulqa_mc2": 53.27, "truthfulqa_gen": 40.64,
            "factor_news": 65.35, "factor_wiki": 56.15, "triviaqa": 38.49,
        },
        "full": {
            "truthfulqa_mc1": 35.13, "truthfulqa_mc2": 54.81, "truthfulqa_gen": 44.08,
            "factor_news": 67.80, "factor_wiki": 58.15, "triviaqa": 39.70,
        },
    },
    "DeepSeek-V2-Lite": {
        "standard": {"truthfulqa_mc2": 31.9, "truthfulqa_gen": 29.1},
        "full": {"truthfulqa_mc2": 43.6, "truthfulqa_gen": 45.9},
    },
}  # fmt: skip


def of(model: str, condition: str) -> dict[str, float]:
    """The paper's percentages for a model, by the end of its name; empty where it has none."""
    for name, conditions in PAPER.items():
        if model.rstrip("/").lower().split("/")[-1].startswith(name.lower()):
            return conditions.get(condition, {})
    return {}
