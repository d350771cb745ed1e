"""The serving benchmark on a CPU: everything but the figures."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import serving
from benchmarks.common import servers
from cor_vllm.testing import tiny_models


@pytest.mark.slow
def test_two_servers_side_by_side(tmp_path: Path) -> None:
    """Real servers, vLLM's own client, experts counted: one round of the stock server against `full`."""
    model = tiny_models.build("qwen3_moe", tmp_path / "tiny")
    setting = serving.on_cpu(tmp_path, model, [2])
    setting = dataclasses.replace(setting, cor={"full": setting.cor["full"]}, flags=(*setting.flags[:-3],
                                  "256", "--max-num-seqs", "8"), input_len=16, output_len=8)  # fmt: skip
    flat = serving.run(setting, 5, 1.0, 1, tmp_path)
    counted = {
        each.name: {2: json.loads(servers.count_experts(each, setting).communicate()[0].splitlines()[-1])[0]}
        for each in setting.contestants()
    }
    rows = {row["server"]: row for row in serving.tables(flat, counted)}
    assert list(rows) == ["stock", "full", serving.AGAIN]
    # Of a client that gets no core, all tokens arrive at once: no time between them when rounded.
    assert all(each["tokens_per_second"] > 0 and each["tpot"] > 0 for each in flat), flat
    assert counted["full"][2]["sum_k"] == counted["stock"][2]["sum_k"] == 9
    assert 3 <= counted["stock"][2]["distinct"] <= 6
    assert "CoR: full, 3 MoE layers" in (tmp_path / "full.log").read_text()
    assert "CoR: " not in (tmp_path / "stock.log").read_text()
