"""Computes the losses of several batches, each under several routings, in one pass over the weights."""

from collections.abc import Mapping, Sequence

import torch

from cor_vllm.calibrate.model.layers import enter, run
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.offload import held
from cor_vllm.calibrate.model.router import Rule


def batch_losses(
    model: MoeModel, batches: Sequence[torch.Tensor], routings: Sequence[Mapping[int, Rule]] = ({},)
) -> list[list[torch.Tensor]]:
    """ℓ(t) of every position of every batch, for each routing.

    If weights wait in host memory or on disk, the batches go through the layers together, and their hidden
    states wait on the host, so that each weight is brought once. A rule sees the same calls in the same order
    either way.

    Args:
        model: the model.
        batches: token ids, [B, S] integers each, padded on the right.
        routings: MoE layer number → rule, as `MoeModel.routing` takes them; {} is the model's own routing.

    Returns:
        For each routing and each batch [B, S−1] float32 on the CPU, nats.
    """
    if model.offloaded:
        return _by_layer(model, batches, routings)
    results = []
    for rules in routings:
        with model.routing(rules):
            results.append([model.losses(input_ids) for input_ids in batches])
    return results


@torch.inference_mode()
def _by_layer(
    model: MoeModel, batches: Sequence[torch.Tensor], routings: Sequence[Mapping[int, Rule]]
) -> list[list[torch.Tensor]]:
    decoder, device = model.model.model, model.device
    with held(model.model.get_input_embeddings()):
        entered = [enter(decoder, input_ids.to(device)) for input_ids in batches]
    states = [[hidden.cpu() for hidden, _ in entered] for _ in routings]
    for index, layer in enumerate(model.decoder_layers):
        with held(layer):
            for rules, hidden in zip(routings, states, strict=True):
                with model.routing(rules):
                    for b, (_, arguments) in enumerate(entered):
                        hidden[b] = run(layer, hidden[b].to(device), arguments.of_layer[index]).cpu()
    with held(decoder.norm, model.model.lm_head):
        return [
            [
                model.sequence_losses(decoder.norm(values.to(device)), input_ids)
                for values, input_ids in zip(hidden, batches, strict=True)
            ]
            for hidden in states
        ]
