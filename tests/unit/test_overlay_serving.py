"""A router file on its way into an engine, and what judges it: as far as that needs no vLLM."""

import dataclasses

import pytest
import torch

from cor_vllm import overlay as overlay_file
from cor_vllm.kernels.scoring import Scoring
from cor_vllm.live.prefix_cache import salt_of
from cor_vllm.overlay import OverlayError, RouterOverlay
from cor_vllm.serve.config import CorConfig
from cor_vllm.serve.process import overlay_of
from cor_vllm.tensor_file import digest
from cor_vllm.verify.gate_judge import judge_gate
from cor_vllm.verify.probe import LayerRecord
from tests.unit.test_overlay import HIDDEN, N, example


def config_of(path, overlay: RouterOverlay, **options: object) -> CorConfig:
    overlay_file.save(path, overlay)
    sha256 = digest(path.read_bytes())
    return CorConfig.of({"router": str(path), "router_sha256": sha256, "admin": True, **options})


def in_layer(layer: int) -> RouterOverlay:
    return example(layer_index=torch.tensor([layer], dtype=torch.int32))


def test_a_file_that_was_replaced_since_the_start_is_noticed(tmp_path):
    config = config_of(tmp_path / "router", example())
    assert overlay_of(config).fingerprint == example().fingerprint
    overlay_file.save(tmp_path / "router", in_layer(3))
    assert overlay_of(config).layer == 4  # read once
    changed = config.model_copy(update={"router_sha256": "0" * 64})
    with pytest.raises(OverlayError, match="has changed since the engine was started"):
        overlay_of(changed)
    assert overlay_of(CorConfig.of({"scores": "s"})) is None


def test_the_last_layers_router_shares_blocks_and_an_earlier_ones_does_not(tmp_path):
    last = config_of(tmp_path / "last", in_layer(4))  # of five layers
    assert salt_of(last) == salt_of(last.changed(None, None, False)) == salt_of(None) == ""
    earlier = config_of(tmp_path / "earlier", in_layer(3))
    off = earlier.changed(None, None, False)
    assert len(salt_of(earlier)) == len(salt_of(off)) == 64
    assert salt_of(earlier) != salt_of(off)
    assert salt_of(off.changed(None, None, True)) == salt_of(earlier)

    scores = {"scores": "s", "sha256": "e" * 64, "mode": "full"}
    alone = CorConfig.of({**scores, "admin": True})
    assert salt_of(config_of(tmp_path / "last", in_layer(4), **scores)) == salt_of(alone)
    both = salt_of(config_of(tmp_path / "earlier", in_layer(3), **scores))
    assert both not in (salt_of(earlier), salt_of(alone))


def record(overlay: RouterOverlay, dtype: torch.dtype = torch.float32, tokens: int = 40) -> LayerRecord:
    """What a layer would record that computes with the router of the file."""
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.linspace(-1, 1, N)
    logits = (x.float() @ overlay.weight.T + bias).to(dtype)
    ids = logits.double().argsort(dim=1, descending=True)[:, :2]
    return LayerRecord(
        name="layers.4", layer_index=4, kernel="K", modular=True, router="CPURouter", top_k=2,
        scoring=Scoring("softmax", renormalize=False), router_logits=logits, topk_ids=ids,
        gate_input=x, gate_output=logits, gate_bias=bias,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_that_computes_with_the_router_of_the_file_is_passed(dtype):
    verdict = judge_gate(record(example(), dtype), example(), alone=True, worker=3)
    assert verdict.problems == ()
    assert (verdict.worker, verdict.layer, verdict.tokens, verdict.as_expected) == (3, 4, 40, 1.0)
    assert verdict.logits_error < {torch.float32: 1e-5}.get(dtype, 0.1)
    assert judge_gate(record(example(), dtype), example(), alone=False).as_expected is None


def problems(**changes: object) -> str:
    changed = dataclasses.replace(record(example()), **changes)
    return "; ".join(judge_gate(changed, example(), alone=True).problems)


def test_what_is_wrong_is_named():
    good = record(example())
    other = example(router_weight=(example().router_weight * (1 + 2**-6)).bfloat16().float())
    (found,) = judge_gate(good, other, alone=False).problems
    assert "logits differ from those of the router file by up to" in found
    assert problems(gate_bias=None).startswith("its router's logits differ")
    assert problems(gate_input=None) == "its router was never asked"
    assert problems(topk_ids=None) == "its expert kernel was never given expert ids"
    assert problems(topk_ids=good.topk_ids.flip(0)).endswith("other experts than the router file says")
    assert "other logits than its linear layer made" in problems(router_logits=good.router_logits + 1)
    nan = good.gate_output.clone()
    nan[0, 0] = torch.nan
    assert "logits differ" in problems(gate_output=nan)
    # Rows of other ranks next to this one's: the experts are held against what the router was given.
    more = {"router_logits": good.router_logits.repeat(2, 1), "topk_ids": good.topk_ids.repeat(2, 1)}
    assert problems(**more) == ""


def test_a_correction_bias_and_groups_select_too():
    scoring = Scoring("sigmoid", renormalize=False, num_expert_group=3, topk_group=1,
                      correction_bias=torch.tensor([0.0, 0, 0, 0, 2, 2]))  # fmt: skip
    chosen = torch.tensor([4, 5]).expand(40, 2)
    assert problems(scoring=scoring, topk_ids=chosen) == ""
    others = torch.tensor([0, 1]).expand(40, 2)
    assert "40 of 40 tokens have other experts" in problems(scoring=scoring, topk_ids=others)
