"""The last decoder layer's routes without replaying the model.

After the experts of the last layer come only the final norm and the head. With x and the residual stream at
hand, the loss of any route is head(norm(residual + Σ w_e·E_e(x))): each expert of the pool runs once a token,
and all routes share its output. Sums, norm and head are float32, whatever the model's dtype.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from cor_vllm.calibrate.model.moe_model import LOSS_ROWS, MoeModel
from cor_vllm.calibrate.routes.draw import DrawOptions, Routes, draw_routes
from cor_vllm.calibrate.routes.standard import LastInputs
from cor_vllm.calibrate.routes.utilities import Standard, Utilities

TOKENS = 256  # of a block


class Head(Protocol):
    """What follows the experts of the last layer."""

    @property
    def device(self) -> torch.device:
        """Where hidden states have to be."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, D] hidden states of the last layer → [R, V] float32 logits of the vocabulary."""


@dataclass(frozen=True, eq=False)
class LastLayer:
    """The parts of the model behind its last router; usable while its weights are on the device."""

    experts: nn.Module
    norm: nn.Module  # float32
    head: torch.Tensor  # [V, D] float32
    bias: torch.Tensor | None  # [V] float32

    @classmethod
    def of(cls, model: MoeModel) -> "LastLayer":
        """Take the parts from a model whose weights are all in memory."""
        head = model.model.lm_head
        bias = None if head.bias is None else head.bias.detach().float()
        norm = copy.deepcopy(model.model.model.norm).float().requires_grad_(False)
        layer: Any = model.decoder_layers[-1]
        return cls(layer.mlp.experts, norm, head.weight.detach().float(), bias)

    @property
    def device(self) -> torch.device:
        """Where norm and head are."""
        return self.head.device

    def expert_outputs(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """E_e(x) of each token's experts: [T, D] and ids [T, P] → [T, P, D] float32 on the device."""
        device, (tokens, pool) = self.device, ids.shape
        repeated = x.to(device).repeat_interleave(pool, dim=0)
        one = torch.ones(len(repeated), 1, dtype=repeated.dtype, device=device)
        outputs = self.experts(repeated, ids.reshape(-1, 1).to(device), one)
        return outputs.view(tokens, pool, -1).float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See Head."""
        return functional.linear(self.norm(hidden), self.head, self.bias)


def log_probs(head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[R, J] float32 log-probabilities of targets [R, J] after the last layer's hidden states [R, D]."""
    found = []
    for rows, wanted in zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True):
        logits = head.logits(rows)
        found.append(logits.gather(1, wanted) - logits.logsumexp(dim=1, keepdim=True))
    return torch.cat(found)


@torch.inference_mode()
def last_layer_utilities(
    model: MoeModel,
    inputs: LastInputs,
    standard: Standard,
    options: DrawOptions,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Utilities:
    """Utilities of the last MoE layer's routes at every scored position.

    Args:
        model: its last decoder layer is a MoE layer.
        inputs: of `read_standard`.
        standard: of `read_standard`.
        options: how to draw.
        advance: is called with the number of tokens that are done.
    """
    layer = model.layer_index[-1]
    routes = draw_routes(
        model.routers[-1], standard.router_logits[-1], standard.keys, layer, options, model.eligible_experts
    )
    part = LastLayer.of(model)
    found = []
    for start in range(0, len(inputs.x), TOKENS):
        rows = slice(start, start + TOKENS)
        outputs = part.expert_outputs(inputs.x[rows], routes.pool[rows])
        found.append(
            route_utilities(part, outputs, inputs.residual[rows], routes[rows], standard.targets[rows])
        )
        advance(len(found[-1]))
    return Utilities.of(layer, routes, torch.cat(found))


def route_utilities(
    head: Head, outputs: torch.Tensor, residual: torch.Tensor, routes: Routes, targets: torch.Tensor
) -> torch.Tensor:
    """Log-probability of each target under each route; routes with the same experts are computed once.

    Args:
        head: norm and head.
        outputs: [T, P, D] float32, what the experts of each token's pool return.
        residual: [T, D], what the weighted outputs are added to.
        routes: of the T tokens.
        targets: [T, J] int64.

    Returns:
        [T, 1+G, J] float32 on the host, nats.
    """
    token, route = routes.distinct.nonzero(as_tuple=True)
    weights = torch.zeros(len(token), routes.pool.shape[1])
    weights.scatter_(1, routes.ranks[token, route], routes.weights[token, route])
    utility = torch.empty(*routes.first.shape, targets.shape[1])
    for block in torch.arange(len(token)).split(LOSS_ROWS):
        at = token[block].to(head.device)
        routed = torch.einsum("rp,rpd->rd", weights[block].to(head.device), outputs[at])
        hidden = residual.to(head.device)[at].float() + routed
        utility[token[block], route[block]] = log_probs(head, hidden, targets.to(head.device)[at]).cpu()
    index = routes.first[:, :, None].expand(-1, -1, targets.shape[1])
    return utility.gather(1, index)
