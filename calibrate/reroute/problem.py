"""The last MoE layer as a problem of its own: everything behind its router, at P positions of a text."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from cor_vllm.calibrate.model.router import Router
from cor_vllm.calibrate.routes.closed_form import TOKENS, Head, log_probs, route_utilities
from cor_vllm.calibrate.routes.draw import DrawOptions, Routes, draw_routes


class Last(Head, Protocol):
    """The experts of the last layer, and the head behind them."""

    def expert_outputs(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """E_e(x) of each token's experts: [T, D] and ids [T, K] → [T, K, D] float32."""


@dataclass(frozen=True, eq=False)
class Problem:
    """P positions with D hidden values; the router has N experts and takes k of them."""

    x: torch.Tensor  # [P, D] float32, the router's input
    residual: torch.Tensor  # [P, D] float32, what the experts' sum is added to
    targets: torch.Tensor  # [P] int64, the tokens of the text
    documents: torch.Tensor  # [P] int64
    keys: torch.Tensor  # [P] int64, for the noise of the draws
    router: Router
    weight: torch.Tensor  # [N, D] float32, the router's own
    bias: torch.Tensor | None  # [N] float32, added to the router's logits; it is never trained
    layer: int  # decoder layer number
    eligible: int  # experts that one token can choose among
    last: Last
    outputs: torch.Tensor | None = None  # [P, N, D] float32, if there is room for what all experts return

    def __len__(self) -> int:
        return len(self.x)

    def logits(self, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[R, N] router logits of `rows` under a weight [N, D]; differentiable by it."""
        return functional.linear(self.x[rows], weight, self.bias)

    def expert_outputs(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[R, K, D] float32: what the experts `ids` [R, K] return at `rows`."""
        if self.outputs is None:
            with torch.no_grad():
                return self.last.expert_outputs(self.x[rows], ids).cpu()
        return self.outputs[rows[:, None], ids]

    def hidden(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[R, D] float32 on the device: what leaves the layer if `rows` take the experts `ids` [R, k]."""
        routed = torch.einsum("rk,rkd->rd", weights, self.expert_outputs(rows, ids))
        return (self.residual[rows] + routed).to(self.last.device)

    def losses(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[R] float32 losses of the text's tokens if `rows` take the experts `ids` [R, k], nats."""
        hidden = self.hidden(rows, ids, weights)
        targets = self.targets[rows, None].to(self.last.device)
        return -log_probs(self.last, hidden, targets)[:, 0].cpu()

    @torch.no_grad()
    def executed(self, weight: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts [R, k] that the router takes with this weight, ascending, and the losses [R], nats."""
        ids, losses = [], []
        for block in rows.split(TOKENS):
            weights, chosen = self.router.route(self.logits(weight, block))
            losses.append(self.losses(block, chosen.long(), weights))
            ids.append(chosen.long().sort(dim=1).values)
        return torch.cat(ids), torch.cat(losses)

    @torch.no_grad()
    def sampled(
        self,
        weight: torch.Tensor,
        rows: torch.Tensor,
        options: DrawOptions,
        keys: torch.Tensor,
        targets: torch.Tensor,
    ) -> tuple[Routes, torch.Tensor]:
        """Draw routes by the router with this weight, and score them.

        Args:
            weight: [N, D] float32.
            rows: [R] int64, at most some hundred.
            options: how to draw.
            keys: [R] int64, for the noise.
            targets: [R, J] int64.

        Returns:
            The routes, and their utilities [R, 1+G, J] float32, nats.
        """
        logits = self.logits(weight, rows)
        routes = draw_routes(self.router, logits, keys, self.layer, options, self.eligible)
        outputs = self.expert_outputs(rows, routes.pool).to(self.last.device)
        return routes, route_utilities(self.last, outputs, self.residual[rows], routes, targets)
