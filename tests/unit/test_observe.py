"""Device counters and what a change of λ or mode means, without an engine."""

from pathlib import Path

import pytest
import torch

from cor_vllm.kernels.reference import cor_topk
from cor_vllm.metadata import ServingInfo
from cor_vllm.serve.config import ConfigError, CorConfig, plan
from cor_vllm.serve.observe import COUNTERS, count
from cor_vllm.testing.make_scores import make

MODEL = Path(__file__).parents[2] / "examples/demo/model"


def counted(ids: list, own: list | None, padding: list | None = None, experts: int = 5) -> list[int]:
    counts = torch.zeros(len(COUNTERS), dtype=torch.int64)
    count(
        counts,
        torch.tensor(ids, dtype=torch.int32),
        None if own is None else torch.tensor(own, dtype=torch.int32),
        experts,
        None if padding is None else torch.tensor(padding),
    )
    return counts.tolist()


def test_slots_changed_distinct_steps():
    #       slots, changed, distinct, steps
    assert counted([[0, 1], [1, 4]], [[1, 0], [1, 2]]) == [4, 1, 3, 1]  # the order within a row is none
    assert counted([[0, 1], [1, 4]], None) == [4, 0, 3, 1]
    assert counted([[0, 1]], [[2, 3]]) == [2, 2, 2, 1]


def test_rows_without_a_token_do_not_count():
    assert counted([[0, 1], [-1, -1]], [[2, 3], [2, 3]]) == [2, 2, 2, 1]
    assert counted([[0, 1], [3, 4]], [[2, 3], [2, 1]], padding=[False, True]) == [2, 2, 2, 1]
    assert counted([[-1, -1]], [[0, 1]]) == counted([[0, 1]], [[2, 3]], padding=[True]) == [0, 0, 0, 0]


def test_counts_against_sets():
    generator = torch.Generator().manual_seed(0)
    counts, want = torch.zeros(4, dtype=torch.int64), [0, 0, 0, 0]
    for tokens in (1, 7, 100):
        logits = torch.randn(tokens, 16, generator=generator)
        _, own = cor_topk(logits, None, 4, False)
        _, ids = cor_topk(logits, 0.3 * torch.rand(16, generator=generator), 4, False)
        count(counts, ids, own, 16, None)
        changed = sum(len(set(a) - set(b)) for a, b in zip(ids.tolist(), own.tolist(), strict=True))
        step = (4 * tokens, changed, len(set(ids.flatten().tolist())), 1)
        want = [a + b for a, b in zip(want, step, strict=True)]
    assert counts.tolist() == want
    assert want[1] > 0


def config(**options: object) -> CorConfig:
    return CorConfig.of({"scores": "x", "sha256": "a" * 64, **options})


def test_the_files_own_lambda_and_mode_are_written_out():
    assert config().resolved(ServingInfo()) == config(mode="full", **{"lambda": 0.1})
    assert config(mode="off").resolved(ServingInfo()) == config(mode="off")
    assert config(swap_rate=0.05).resolved(ServingInfo(mode="expert")).lambda_ is None
    assert config(static_k=3).resolved(ServingInfo()) == config(static_k=3)
    with pytest.raises(ConfigError, match="mode 'layer' has no λ"):
        config(**{"lambda": 0.2}).resolved(ServingInfo(mode="layer"))  # the file was tuned to it


def test_a_change_keeps_what_it_does_not_name():
    start = config(mode="full", admin=True, **{"lambda": 0.3})
    off = start.changed(None, "off")
    assert off.mode == "off"
    assert off.changed(None, "full") == start
    assert start.changed(0.5, "expert") == config(mode="expert", admin=True, **{"lambda": 0.5})
    assert config(mode="full", admin=True, swap_rate=0.05).changed(0.5, None).swap_rate is None
    with pytest.raises(ConfigError, match="--cor-admin"):
        config(mode="full").changed(0.5, None)
    with pytest.raises(ConfigError, match="has no λ"):
        off.changed(0.5, None)
    with pytest.raises(ConfigError, match="cannot be entered"):
        start.changed(None, "random")


def test_the_routing_digest_tells_routings_apart_and_nothing_else():
    start = config(mode="full", **{"lambda": 0.1})
    same = [
        start.model_copy(update={"scores": "y", "admin": True, "observe": True}),
        config().resolved(ServingInfo()),
    ]
    other = [
        start.model_copy(update=update)
        for update in ({"sha256": "b" * 64}, {"lambda_": 0.2}, {"mode": "expert"}, {"weights": "fused"})
    ] + [config(static_k=3), config(mode="random"), config(mode="random", seed=1), config(mode="off")]
    assert {c.routing_digest() for c in same} == {start.routing_digest()}
    assert len({c.routing_digest() for c in [start, *other]}) == 1 + len(other)
    admin = config(mode="full", admin=True, **{"lambda": 0.1})
    assert admin.changed(None, "off").routing_digest() == config(mode="off").routing_digest()


@pytest.mark.parametrize("mode", ["full", "layer", "expert", "off"])
def test_with_admin_every_layer_has_a_buffer(mode):
    values = make(MODEL)
    for lambda_ in (None, 0.0):
        if lambda_ is not None and mode in ("layer", "off"):
            continue
        options = {"mode": mode, "lambda": lambda_}
        layers = plan(config(admin=True, **options), values).values()
        plain = plan(config(**options), values).values()
        biased = lambda_ is None and mode in ("full", "expert")
        for layer, usual in zip(layers, plain, strict=True):
            assert layer.bias is not None and layer.biased == usual.biased == biased
            assert (usual.bias is not None) == biased
            assert layer.lambda_ == usual.lambda_ == (0.1 if biased else 0.0)


def test_a_lambda_beyond_float32_is_refused():
    with pytest.raises(ConfigError, match="float32"):
        plan(config(mode="full", **{"lambda": 1e300}), make(MODEL))
