"""The kernel's machine code for an H100 against a table of budgets: a regression shows without a GPU."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # compiles for half a minute

# (experts, k, tokens, logits, scoring, groups kept, padding): instructions per row at most. The first three
# are promised; the others are what triton 3.9 makes of it today and 3 % (3.6 stays within 15 % of them).
BUDGETS = {
    (128, 8, 1, "bf16", "softmax", 1, False): 450,
    (256, 8, 1, "bf16", "softmax", 1, False): 760,
    (32, 4, 1, "bf16", "softmax", 1, False): 160,
    (128, 12, 1, "bf16", "softmax", 1, False): 560,
    (128, 16, 1, "bf16", "softmax", 1, False): 669,
    (128, 24, 1, "bf16", "softmax", 1, False): 807,
    (64, 6, 1, "bf16", "softmax", 1, False): 272,
    (512, 10, 1, "bf16", "softmax", 1, False): 1407,
    (60, 4, 1, "bf16", "softmax", 1, False): 238,
    (160, 8, 1, "bf16", "sigmoid", 1, False): 672,
    (256, 8, 1, "bf16", "sigmoid", 4, False): 777,
    (128, 8, 4096, "bf16", "softmax", 1, False): 431,
    (32, 4, 4096, "bf16", "softmax", 1, False): 56,
    (64, 6, 4096, "bf16", "softmax", 1, False): 147,
    (128, 8, 1, "fp32", "softmax", 1, False): 431,
    (128, 8, 1, "bf16", "softmax", 1, True): 452,
}
REGISTERS = 64  # of 255; far more would say that a row no longer stays in its warp's registers


@pytest.fixture(scope="module")
def table() -> dict:
    # The tests' own process has TRITON_INTERPRET=1, which leaves nothing to compile.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.instructions", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    keys = ("experts", "top_k", "tokens", "dtype", "scoring_func", "topk_group", "padding")
    return {tuple(row[key] for key in keys): row for row in json.loads(run.stdout)}


def test_every_case_has_a_budget(table):
    assert set(table) == set(BUDGETS)


def test_instructions_per_row_stay_in_their_budgets(table):
    over = {
        case: (row["instructions"], BUDGETS[case])
        for case, row in table.items()
        if row["instructions"] > BUDGETS[case]
    }
    assert not over, f"(instructions per row, budget): {over}"


def test_nothing_spills(table):
    assert all(row["spills"] == 0 for row in table.values()), table
    assert all(0 < row["registers"] <= REGISTERS for row in table.values()), table
