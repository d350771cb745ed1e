"""vLLM's router interface ↔ the routing step; the only file that names vLLM's router types."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from vllm import envs
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from cor_vllm.kernels.dispatch import WARM_UP_TOKENS, route
from cor_vllm.kernels.reference import probabilities, random_scores, select
from cor_vllm.kernels.scoring import Scoring
from cor_vllm.modes import LayerRouting
from cor_vllm.serve import observe
from cor_vllm.serve.compat import AlwaysAsked


class CorRouter(AlwaysAsked, BaseRouter):
    """Routes one MoE layer by counterfactual routing.

    It stands in front of the router that vLLM would have used (`stock`, built with this layer's k_l). If
    the score is the model's own, the stock router decides: with k_l = top_k the server is then bit-identical
    to one without the plugin, on every platform.

    Args:
        stock: vLLM's own router for this layer.
        layer: how it selects its experts.
        options: what vLLM made `stock` with, the arguments of its create_fused_moe_router.
        logits_dtype: of the router logits that will come.
        widest: the most experts that any layer selects.
        num_experts: N, columns of the router logits.
    """

    def __init__(
        self,
        stock: BaseRouter,
        layer: LayerRouting,
        options: dict[str, Any],
        *,
        logits_dtype: torch.dtype,
        widest: int,
        num_experts: int,
    ) -> None:
        super().__init__(stock.top_k, stock.global_num_experts, stock.eplb_state)
        self.stock = stock
        self.layer = layer
        self.logits_dtype = logits_dtype
        self.widest = widest
        self.num_experts = num_experts
        # All made here, so that no forward makes or validates one.
        self.scoring = scoring_of(options)
        self.fused_scoring = dataclasses.replace(self.scoring, renormalize=True)
        # For ids whose weights nobody reads.
        self.ids_scoring = dataclasses.replace(self.scoring, renormalize=False, scale=1.0)
        self.on_cpu = isinstance(stock, CPURouter)
        # As the stock router would mark padding rows; expert kernels skip them.
        self.marks_padding = not self.on_cpu and (options["skip_padding"] or not _grouped(options))
        self.bias = layer.bias  # [N] float32; the plugin replaces it by the layer's buffer on the device
        self.counts: torch.Tensor | None = None  # int64, observe.COUNTERS; a buffer that the plugin sets

    @property
    def routing_method_type(self) -> RoutingMethodType:
        """Custom: kernels that route inside themselves refuse it, so vLLM picks one that asks us."""
        return RoutingMethodType.Custom

    @property
    def decided_by_vllm(self) -> bool:
        """Whether the stock router selects and weighs, because the score is the model's own."""
        return self.bias is None and not self.layer.random and not self.layer.fused

    def set_capture_fn(self, capture_fn: Callable[[torch.Tensor], None] | None) -> None:
        """For --enable-return-routed-experts, whose buffer has one width for all layers.

        A layer with fewer experts repeats its last one. Any other filler would be some expert's id, too.
        """
        filler = self.widest - self.top_k
        if capture_fn is None or filler == 0:
            super().set_capture_fn(capture_fn)
            return

        def padded(topk_ids: torch.Tensor) -> None:
            capture_fn(torch.cat([topk_ids, topk_ids[:, -1:].expand(-1, filler)], dim=1))

        super().set_capture_fn(padded)

    def weights_loaded(self) -> None:
        """Make ready to serve, once the model's own parameters have their values."""
        if self.bias is not None:
            self._fill_bias()
        buffer = self.counts if self.bias is None else self.bias
        if buffer is not None and buffer.is_cuda:
            self._compile_kernel(buffer.device)

    def change(self, layer: LayerRouting) -> None:
        """Route by another λ·CEI from the next forward on; k_l is part of graphs and must be the same."""
        assert layer.top_k == self.top_k and layer.random == self.layer.random, "parts of captured graphs"
        self.layer = layer
        self._fill_bias()

    def _fill_bias(self) -> None:
        assert self.bias is not None and self.layer.bias is not None, "a buffer where the layer has λ·CEI"
        device = self.bias.device
        total = self.scoring.total_bias(self.layer.bias.to(device), device)
        assert total is not None, "a sum of at least λ·CEI"
        self.bias.copy_(total)  # in place: CUDA graphs replay the address

    def _compile_kernel(self, device: torch.device) -> None:
        """All variants that serving will need: later one would stall requests, or break a graph capture."""
        for tokens in WARM_UP_TOKENS:
            logits = torch.zeros((tokens, self.num_experts), dtype=self.logits_dtype, device=device)
            no_padding = torch.zeros(tokens, dtype=torch.bool, device=device)
            for is_padding in (no_padding, None):
                if self.bias is not None:
                    self._route(logits, torch.int32, is_padding)
            if self.counts is not None:
                self._own_ids(logits)

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Select this layer's experts: (topk_weights [T, k_l] float32, topk_ids [T, k_l])."""
        own = self.decided_by_vllm
        if own:
            weights, ids = self.stock._compute_routing(
                hidden_states, router_logits, indices_type, input_ids=input_ids
            )
        else:
            padding = self._padding(len(router_logits))
            weights, ids = self._route(router_logits, indices_type or torch.int32, padding)
        if self.counts is not None:
            own_ids = None if own else self._own_ids(router_logits)
            observe.count(self.counts, ids, own_ids, self.num_experts, self._rows_without_token(len(ids)))
        return weights, ids

    def _own_ids(self, router_logits: torch.Tensor) -> torch.Tensor:
        """[T, k_l]: the experts that the model's own score would have chosen."""
        return route(router_logits, self.scoring.total_bias(), self.top_k, self.ids_scoring)[1]

    def _route(
        self, router_logits: torch.Tensor, indices_type: torch.dtype, is_padding: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows: dict[str, Any] = {"is_padding": is_padding, "indices_type": indices_type}
        if self.layer.random:
            probs = probabilities(router_logits, self.scoring.scoring_func)
            scores = random_scores(router_logits, self.layer.seed)
            return select(probs, scores, self.top_k, self.scoring, **rows)
        if self.layer.fused:
            scores = probabilities(router_logits, self.scoring.scoring_func)
            bias = self.scoring.total_bias() if self.bias is None else self.bias
            scores = scores if bias is None else scores + bias
            return select(scores, scores, self.top_k, self.fused_scoring, **rows)
        return route(router_logits, self.bias, self.top_k, self.scoring, **rows)

    def _padding(self, tokens: int) -> torch.Tensor | None:
        """[tokens] bool, the rows to mark as padding; None if vLLM marks none."""
        marked = self.marks_padding and envs.VLLM_MOE_SKIP_PADDING
        return self._rows_without_token(tokens) if marked else None

    def _rows_without_token(self, tokens: int) -> torch.Tensor | None:
        """[tokens] bool, the rows that only fill up a CUDA graph; None on the CPU, which has none."""
        if self.on_cpu or not is_forward_context_available():
            return None
        is_padding = get_forward_context().is_padding
        return None if is_padding is None else is_padding[:tokens]


def scoring_of(options: dict[str, Any]) -> Scoring:
    """How a layer of vLLM scores.

    Args:
        options: what vLLM makes the layer's router with, the arguments of its create_fused_moe_router.

    Returns:
        A Scoring with the model's own correction bias, whose values the loader fills in later.
    """
    grouped = _grouped(options)
    return Scoring(
        options["scoring_func"],
        options["renormalize"],
        options["routed_scaling_factor"],
        options["num_expert_group"] if grouped else 1,
        options["topk_group"] if grouped else 1,
        options["e_score_correction_bias"],
    )


def _grouped(options: dict[str, Any]) -> bool:
    return bool(options["use_grouped_topk"] and options["num_expert_group"] > 1)
