"""How many expert slots counterfactual routing fills otherwise, measured on the questions themselves."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from cor_vllm.calibrate.model.loading import load_model
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.router import rule_of
from cor_vllm.modes import LayerRouting
from cor_vllm.scores import Scores
from cor_vllm.serve.config import RoutingOptions, plan


def share_changed(model: Path, scores: Scores, texts: list[str]) -> list[float]:
    """Per MoE layer, the share of counterfactual routing's expert slots that stock routing would not fill.

    Both routings run through the whole model on the same text, so that a layer also sees what earlier
    layers changed.

    Args:
        model: the model folder.
        scores: its scores file, read.
        texts: what is routed; every token counts once.
    """
    moe, tokenizer = load_model(model, dtype="float32", device="cpu"), AutoTokenizer.from_pretrained(model)
    layers = list(plan(RoutingOptions(), scores).values())
    changed = torch.zeros(len(layers), dtype=torch.long)
    slots = torch.zeros_like(changed)
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        stock = _selected(moe, ids, [LayerRouting(i, moe.top_k) for i in moe.layer_index])
        routed = _selected(moe, ids, layers)
        for number, (before, after) in enumerate(zip(stock, routed, strict=True)):
            changed[number] += int((after & ~before).sum())
            slots[number] += int(after.sum())
    return (changed / slots).tolist()


def _selected(moe: MoeModel, ids: torch.Tensor, layers: list[LayerRouting]) -> list[torch.Tensor]:
    """Per layer, which experts each token has: [T, N] bool."""
    rules = [rule_of(router, layer) for router, layer in zip(moe.routers, layers, strict=True)]

    with (
        moe.routing(dict(enumerate(rules))),
        moe.record_router_logits() as logits,
    ):
        moe.losses(ids)
    masks = []
    for route, records in zip(rules, logits, strict=True):
        chosen = route(torch.cat(records))[1].long()
        masks.append(torch.zeros(len(chosen), moe.num_experts, dtype=torch.bool).scatter_(1, chosen, True))
    return masks
