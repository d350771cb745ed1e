"""vLLM's router interface ↔ the routing step; the only file that names vLLM's router types."""

import torch
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from cor_vllm.config import LayerRouting, Weights
from cor_vllm.kernels.dispatch import cor_topk
from cor_vllm.kernels.reference import probabilities, select


class CorRouter(BaseRouter):
    """Routes one MoE layer by counterfactual routing.

    It stands in front of the router that vLLM would have used (`stock`, built with this layer's k_l). Where
    the score is the model's own, the stock router decides: with k_l = top_k the server is then bit-identical
    to one without the plugin, on every platform.
    """

    def __init__(
        self,
        stock: BaseRouter,
        layer: LayerRouting,
        *,
        renormalize: bool,
        scale: float,
        weights: Weights,
        seed: int,
    ) -> None:
        super().__init__(stock.top_k, stock.global_num_experts, stock.eplb_state)
        self.stock = stock
        self.layer = layer
        self.renormalize = renormalize
        self.scale = scale
        self.fused = weights == "fused"
        self.seed = seed
        self.bias = layer.bias  # [N] float32; the plugin replaces it by the layer's buffer on the device

    @property
    def routing_method_type(self) -> RoutingMethodType:
        """Custom: kernels that route inside themselves refuse it, so vLLM picks one that asks us."""
        return RoutingMethodType.Custom

    @property
    def supports_monolithic_kernels(self) -> bool:
        """vLLM 0.33 asks this before it considers a kernel that routes inside itself."""
        return False

    def _compute_routing(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Select this layer's experts: (topk_weights [T, k_l] float32, topk_ids [T, k_l])."""
        if self.layer.random:
            probs = probabilities(router_logits)
            scores = random_scores(router_logits, self.seed + self.layer.layer_index)
            return select(probs, scores, self.top_k, self.renormalize, self.scale)
        if self.fused:
            scores = probabilities(router_logits)
            scores = scores if self.bias is None else scores + self.bias
            return select(scores, scores, self.top_k, True, self.scale)
        if self.bias is None:
            return self.stock._compute_routing(
                hidden_states, router_logits, indices_type, input_ids=input_ids
            )
        return cor_topk(router_logits, self.bias, self.top_k, self.renormalize, scale=self.scale)


def random_scores(router_logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Uniform scores per token and expert that depend on nothing but the token's own logits and the seed.

    A generator would give other numbers under another batch order, on every tensor-parallel rank, and the
    same ones at every replay of a CUDA graph. Hashing the logits' bits has none of that.

    Args:
        router_logits: [T, N], any float dtype.
        seed: differs by layer.

    Returns:
        [T, N] float32 in [0, 1).
    """
    bits = router_logits.float().contiguous().view(torch.int32).long()
    experts = torch.arange(1, bits.shape[1] + 1, device=bits.device)
    token = (_mix(bits + experts * 0x9E3779B97F4A7C1)).sum(dim=1, keepdim=True)
    return (_mix(_mix(token + seed) + experts * 0x9E3779B97F4A7C1) & 0xFFFFFF).float() / (1 << 24)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of splitmix64 (Steele et al., 2014) on int64, which wraps around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
