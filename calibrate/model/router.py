"""How one MoE layer routes: the model's own rule, and that rule with a bias or without an expert."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from cor_vllm.kernels import reference
from cor_vllm.kernels.reference import SMALLEST
from cor_vllm.kernels.scoring import Scoring
from cor_vllm.modes import LayerRouting

Rule = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""router_logits [T, N] → (weights [T, K] float32, ids [T, K] integer); K is the rule's own."""


@dataclass(frozen=True, eq=False)
class Router:
    """How one MoE layer of a model routes: it selects `top_k` experts as its `scoring` says."""

    top_k: int
    scoring: Scoring

    @property
    def correction_bias(self) -> torch.Tensor:
        """[N] float32, the model's own; zeros if it has none."""
        assert self.scoring.correction_bias is not None, "MoeModel gives every router one"
        return self.scoring.correction_bias

    def probabilities(self, router_logits: torch.Tensor) -> torch.Tensor:
        """g [T, N] float32."""
        return reference.probabilities(router_logits, self.scoring.scoring_func)

    def select(
        self, probs: torch.Tensor, scores: torch.Tensor, top_k: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of highest `scores` [T, N], weighed by `probs` [T, N].

        Returns:
            (weights [T, K] float32, ids [T, K] int32), by descending score.
        """
        return reference.select(probs, scores, top_k or self.top_k, self.scoring)

    def route(
        self, router_logits: torch.Tensor, bias: torch.Tensor | None = None, top_k: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own rule with `bias` [N] added to its scores, and `top_k` experts (Eq. 9).

        Returns:
            As `select` does.
        """
        probs = self.probabilities(router_logits)
        return self.select(probs, self.scores(probs, bias), top_k)

    def scores(self, probs: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[T, N] what the experts are selected by: probabilities, the model's own bias and `bias`."""
        added = self.scoring.total_bias(bias, probs.device)
        return probs if added is None else probs + added

    def without(self, experts: torch.Tensor, ablation: str) -> Rule:
        """Routing with one expert e per token taken away (Eq. 5).

        g̃ is g without e. For a softmax, e is set to 0 and the rest is divided by 1 − g_e, which is
        the softmax over the other experts; taking it from the logits keeps it exact if g_e is close to 1. A
        sigmoid's values do not sum to 1: e is set to 0, and the others stay as they are.

        Args:
            experts: [T] integer, the expert that token loses.
            ablation: `backfill`: e's score is −inf, for its group's score too, and the weights are those of
                g̃, so the next-best expert moves up. `drop`: the active experts stay, and e's weight goes to
                the others. If the model renormalises, these are the weights of g̃ over them; if it does
                not, a softmax router's are g̃ (divided by 1 − g_e), and a sigmoid router's are scaled up to
                the sum that they had with e. If e was not active, nothing changes. With a single active
                expert the token gets no routed expert.
        """

        def rule(router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            taken = experts.to(router_logits.device)[:, None]
            reduced = self.probabilities(router_logits.float().scatter(1, taken, -torch.inf))
            if ablation == "backfill":
                return self.select(reduced, self.scores(reduced).scatter(1, taken, -torch.inf))
            probs = self.probabilities(router_logits)
            scores = self.scores(probs)
            weights, ids = self.select(probs, scores)
            removed = ids == taken
            affected = removed.any(dim=1, keepdim=True)
            if self.scoring.scoring_func == "softmax":
                return self.select(torch.where(affected, reduced, probs), scores)
            others = weights.masked_fill(removed, 0.0)
            shares = others / others.sum(dim=1, keepdim=True).clamp_min(SMALLEST)
            return torch.where(affected, shares * weights.sum(dim=1, keepdim=True), weights), ids

        return rule


def rule_of(router: Router, layer: LayerRouting) -> Rule:
    """What the server does in a layer that is planned so (modes.plan), for a transformers model."""
    if layer.random:
        return lambda logits: router.select(
            router.probabilities(logits), reference.random_scores(logits, layer.seed), layer.top_k
        )
    if layer.fused:
        return lambda logits: _fused(router, layer, logits)
    bias = layer.bias
    return lambda logits: router.route(logits, None if bias is None else bias.to(logits.device), layer.top_k)


def _fused(router: Router, layer: LayerRouting, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights from the score, renormalised."""
    probs = router.probabilities(logits)
    bias = None if layer.bias is None else layer.bias.to(probs.device)
    scores = router.scores(probs, bias)
    return reference.select(scores, scores, layer.top_k, replace(router.scoring, renormalize=True))
