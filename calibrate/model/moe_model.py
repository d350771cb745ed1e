"""A transformers MoE model whose routing and outputs can be intervened on.

The routers of transformers 5 share one interface: the router module returns (router_logits [T, N],
weights [T, K], ids [T, K]) and the block hands weights and ids to its experts. Replacing that output is
therefore the one mechanism behind every routing intervention, for every supported family.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.model.families import Family, check_family, eligible_experts, num_experts
from cor_vllm.calibrate.model.offload import execution_device, held, is_offloaded
from cor_vllm.calibrate.model.router import Router, Rule

LOSS_ROWS = 1024  # rows of vocabulary logits that exist at one time: 0.6 GB at 150,000 words in float32


class MoeModel:
    """A causal language model in evaluation mode, with its M MoE layers numbered 0 to M−1.

    Args:
        model: a transformers `…ForCausalLM` of a supported family.

    Raises:
        CalibrationError: unsupported family, no MoE layer, or fewer than two experts.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        family = check_family(config)
        self.model = model.eval()
        self.config = config
        self._decoder_layers: list[nn.Module] = []
        self._router_modules: list[nn.Module] = []
        self.layer_index: list[int] = []  # decoder layer number of each MoE layer
        for index, layer in enumerate(model.model.layers):
            if hasattr(layer.mlp, family.router) and hasattr(layer.mlp, "experts"):
                self._decoder_layers.append(layer)
                self._router_modules.append(getattr(layer.mlp, family.router))
                self.layer_index.append(index)
        if not self._router_modules:
            raise CalibrationError(f"{config.architectures[0]}: this model has no MoE layer to calibrate")
        self.num_experts = num_experts(config)
        self.eligible_experts = eligible_experts(config)
        self.top_k: int = config.num_experts_per_tok
        self.routers = [_rule(family, config, module) for module in self._router_modules]
        if self.num_experts < 2:
            raise CalibrationError(
                "a single routed expert leaves nothing to choose; no calibration is needed"
            )

    @property
    def num_layers(self) -> int:
        """M, the number of MoE layers."""
        return len(self._router_modules)

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """All decoder layers, those without experts too."""
        return list(self.model.model.layers)

    @property
    def device(self) -> torch.device:
        """The device that input ids have to be on."""
        return execution_device(self.model.get_input_embeddings())

    def router_weight(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [N, D] of the router of MoE layer `layer`, and its bias [N] if it has one, float32."""
        module: Any = self._router_modules[layer]
        bias = getattr(module, "bias", None)
        with held(module):
            weight = module.weight.detach().float().cpu().clone()
            return weight, None if bias is None else module.bias.detach().float().cpu().clone()

    def replace_router(self, decoder_layer: int, weight: torch.Tensor) -> None:
        """Put another router into a layer, in place, in the dtype of the model's own.

        Args:
            decoder_layer: decoder layer number; it has a router.
            weight: [N, D] float32.
        """
        module: Any = self._router_modules[self.layer_index.index(decoder_layer)]
        if is_offloaded(module):
            raise CalibrationError(
                f"the router of decoder layer {decoder_layer} waits in host memory or on disk, so no other "
                "router can be put into it; give --device cpu, or --dtype bfloat16"
            )
        with torch.no_grad():
            module.weight.copy_(weight)

    @property
    def offloaded(self) -> bool:
        """Whether weights wait in host memory or on disk until they are called."""
        return is_offloaded(self.model)

    @torch.inference_mode()
    def losses(self, input_ids: torch.Tensor) -> torch.Tensor:
        """ℓ(t) of every position, under whatever interventions are active.

        Args:
            input_ids: [B, S] integer token ids; rows shorter than S are padded on the right with any id
                (attention is causal, so padding changes nothing before it).

        Returns:
            [B, S−1] float32 on the CPU, nats: column t is −log p(token t+1 | tokens ≤ t).
        """
        input_ids = input_ids.to(self.device)
        hidden = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.sequence_losses(hidden, input_ids)

    def sequence_losses(self, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, S−1] float32 losses on the CPU, nats, of [B, S, D] hidden states after the final norm."""
        flat, targets = hidden[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
        chunks = [
            self.head_losses(rows, target)
            for rows, target in zip(flat.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
        ]
        return torch.cat(chunks).view(len(input_ids), -1).cpu()

    def head_losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """[R] float32 losses of [R, D] hidden states, after the final norm, at [R] target tokens, nats."""
        logits = self.model.lm_head(hidden).float()
        return functional.cross_entropy(logits, targets.to(logits.device), reduction="none")

    @contextmanager
    def routing(self, rules: Mapping[int, Rule], rows: torch.Tensor | None = None) -> Iterator[None]:
        """Route by `rules` (MoE layer number → rule) instead of by the model.

        Args:
            rules: layers that are not named keep the model's own routing.
            rows: [B, S] bool, the tokens whose routing is replaced; None: all.
        """
        with ExitStack() as stack:
            for layer, rule in rules.items():
                hook = self._router_modules[layer].register_forward_hook(_replace_routing(rule, rows))
                stack.callback(hook.remove)
            yield

    @contextmanager
    def record_router_logits(self) -> Iterator[list[list[torch.Tensor]]]:
        """Collect the router logits of every forward: one list per MoE layer, float32 [B·S, N] on the CPU."""
        records: list[list[torch.Tensor]] = [[] for _ in self._router_modules]

        def recorder(record: list[torch.Tensor]) -> Callable[..., None]:
            return lambda module, args, output: record.append(output[0].float().cpu())

        with ExitStack() as stack:
            for router, record in zip(self._router_modules, records, strict=True):
                stack.callback(router.register_forward_hook(recorder(record)).remove)
            yield records

    @contextmanager
    def scale_output(
        self, layer: int, factor: float, rows: torch.Tensor | None = None, whole_layer: bool = False
    ) -> Iterator[None]:
        """Multiply what MoE layer `layer` adds to the residual stream, or the stream itself, by `factor`.

        Args:
            layer: MoE layer number.
            factor: 1 + δ of Eq. 3.
            rows: [B, S] bool, the tokens that are scaled; None: all.
            whole_layer: scale the residual stream after the layer instead of the block's contribution
                (routed plus shared experts).
        """
        decoder_layer = self._decoder_layers[layer]
        module = decoder_layer if whole_layer else decoder_layer.mlp
        assert isinstance(module, nn.Module), "a decoder layer without an mlp has no place in this list"
        hook = module.register_forward_hook(_scale(factor, rows))
        try:
            yield
        finally:
            hook.remove()


def _rule(family: Family, config: Any, module: nn.Module) -> Router:
    """The rule that a router module follows; its correction bias is a buffer, so it is never offloaded."""
    correction_bias = getattr(module, "e_score_correction_bias", torch.zeros(num_experts(config)))
    return Router(config.num_experts_per_tok, family.scoring(config, correction_bias.float()))


def _replace_routing(rule: Rule, rows: torch.Tensor | None) -> Callable[..., tuple[torch.Tensor, ...]]:
    def hook(module: nn.Module, args: object, output: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        router_logits, own_weights, own_ids = output
        weights, ids = rule(router_logits)
        weights, ids = weights.to(own_weights.dtype), ids.to(own_ids.dtype)
        if rows is not None:
            # Both sides get the wider width; a slot of weight 0 adds exactly nothing.
            width = max(weights.shape[1], own_weights.shape[1])
            chosen = rows.flatten().to(weights.device)[:, None]
            weights = torch.where(chosen, _widen(weights, width), _widen(own_weights, width))
            ids = torch.where(chosen, _widen(ids, width), _widen(own_ids, width))
        return router_logits, weights, ids

    return hook


def _widen(values: torch.Tensor, width: int) -> torch.Tensor:
    return functional.pad(values, (0, width - values.shape[1]))


def _scale(factor: float, rows: torch.Tensor | None) -> Callable[..., object]:
    def hook(module: nn.Module, args: object, output: Any) -> object:
        # The GPT-OSS block returns its router scores next to the hidden states.
        hidden = output[0] if isinstance(output, tuple) else output
        scaled = hidden * factor
        if rows is not None:
            scaled = torch.where(rows.to(hidden.device)[:, :, None], scaled, hidden)
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    return hook
