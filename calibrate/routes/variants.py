"""Which variants a route analysis starts, and how each of them is routed.

A variant is one scored token under one route. The variants of a layer start there, each on a route that was
drawn beforehand, and are routed by the model itself in the layers above. Those of the joint draw start at the
first MoE layer; at every layer their route is drawn from the router logits that they have themselves.
"""

from dataclasses import dataclass

import torch

from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.router import Rule
from cor_vllm.calibrate.routes.draw import DrawOptions, draw_numbered, draw_routes
from cor_vllm.calibrate.routes.utilities import Standard, Utilities
from cor_vllm.kernels import reference


@dataclass(frozen=True, eq=False)
class Variants:
    """R variants that start at one MoE layer, and the utilities that they fill in."""

    model: MoeModel
    standard: Standard
    options: DrawOptions
    start: int  # number of the MoE layer
    token: torch.Tensor  # [R] int64, ascending
    route: torch.Tensor  # [R] int64, the route's number among those of its token
    utilities: Utilities

    @property
    def layer(self) -> int:
        """The decoder layer at which they start."""
        return self.model.layer_index[self.start]

    def within(self, tokens: slice) -> slice:
        """The variants of a run of tokens."""
        first, end = torch.searchsorted(self.token, torch.tensor([tokens.start, tokens.stop])).tolist()
        return slice(first, end)

    def rule(self, moe: int, rows: slice) -> Rule | None:
        """How MoE layer `moe` routes some of the variants; None: as the model does."""
        raise NotImplementedError

    def result(self) -> Utilities:
        """The utilities, once every variant has been read."""
        return self.utilities


@dataclass(frozen=True, eq=False)
class LayerVariants(Variants):
    """Every distinct route of every token at one layer."""

    ids: torch.Tensor  # [R, k] int16, the experts

    @classmethod
    def draw(cls, model: MoeModel, standard: Standard, options: DrawOptions, moe: int) -> "LayerVariants":
        """Draw the routes of MoE layer `moe`."""
        layer, logits = model.layer_index[moe], standard.router_logits[moe]
        routes = draw_routes(
            model.routers[moe], logits, standard.keys, layer, options, model.eligible_experts
        )
        token, route = routes.distinct.nonzero(as_tuple=True)
        utility = torch.zeros(*routes.first.shape, standard.targets.shape[1])
        utilities = Utilities.of(layer, routes, utility)
        return cls(model, standard, options, moe, token, route, utilities, routes.ids[token, route].short())

    def rule(self, moe: int, rows: slice) -> Rule | None:
        if moe != self.start:
            return None
        router, ids = self.model.routers[moe], self.ids[rows].long()

        def given(router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = ids.to(router_logits.device)
            probs = router.probabilities(router_logits).gather(1, chosen)
            return reference.weigh(probs, router.scoring), chosen

        return given

    def result(self) -> Utilities:
        found = self.utilities
        index = found.first[:, :, None].expand_as(found.utility)
        found.utility.copy_(found.utility.gather(1, index))  # routes with the same experts ran once
        return found


class JointVariants(Variants):
    """Every numbered draw of every token, at all layers at once. Their scores are sums over the layers."""

    @classmethod
    def all(cls, model: MoeModel, standard: Standard, options: DrawOptions) -> "JointVariants":
        """All tokens on all numbers, the standard one included."""
        tokens, routes = len(standard.keys), 1 + options.routes
        numbers = torch.arange(routes).repeat(tokens, 1)
        utilities = Utilities(
            layer=None,
            utility=torch.zeros(tokens, routes, standard.targets.shape[1]),
            first=numbers,
            log_score=torch.zeros(tokens, routes),
            score=torch.zeros(tokens, routes),
            ids=None,
        )
        token = torch.arange(tokens).repeat_interleave(routes)
        return cls(model, standard, options, 0, token, numbers.flatten(), utilities)

    def rule(self, moe: int, rows: slice) -> Rule | None:
        router, layer = self.model.routers[moe], self.model.layer_index[moe]
        token, route = self.token[rows], self.route[rows]
        keys = self.standard.keys[token]

        def own(router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = router_logits.float().cpu()
            routes = draw_numbered(
                router, logits, keys, layer, route, self.options, self.model.eligible_experts
            )
            self.utilities.log_score[token, route] += routes.log_score[:, 0]
            self.utilities.score[token, route] += routes.score[:, 0]
            device = router_logits.device
            return routes.weights[:, 0].to(device), routes.ids[:, 0].to(device)

        return own
