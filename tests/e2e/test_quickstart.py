"""examples/quickstart.py, which the README shows: it runs as it stands and is short enough to read."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_vllm_commands import of_processes

PROGRAM = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_it_can_be_read_at_a_glance() -> None:
    assert len(PROGRAM.read_text().splitlines()) <= 30


@pytest.mark.slow
def test_stock_and_counterfactual_routing_answer_side_by_side(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], cwd=tmp_path, env=of_processes(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if "stock: " in line]
    assert len(rows) == 3
    said = [[part.strip() for part in row.partition("stock: ")[2].split("CoR: ")] for row in rows]
    assert all(stock and cor for stock, cor in said), rows
    assert any(stock != cor for stock, cor in said), "the routing changes nothing here"
