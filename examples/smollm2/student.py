"""The trainable form of a recipe: the dense model with split feed-forward networks and low-rank updates."""

from __future__ import annotations

from typing import Any

import torch
from recipe import ATTENTION, FFN, Layout, Recipe
from torch import nn
from torch.nn import functional


def low_rank(rank: int, inputs: int, outputs: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Factors of an update that starts at zero."""
    return {
        "a": torch.randn(rank, inputs, generator=generator) / inputs**0.5,
        "b": torch.zeros(outputs, rank),
    }


class Projection(nn.Module):
    """A frozen weight with a trainable low-rank update."""

    def __init__(self, weight: torch.Tensor, factors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight.to(dtype).contiguous())
        self.a = nn.Parameter(factors["a"].float())  # [r, in]
        self.b = nn.Parameter(factors["b"].float())  # [out, r]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        inner = functional.linear(rows, self.a.to(rows.dtype))
        out = torch.addmm(functional.linear(rows, self.weight), inner, self.b.to(rows.dtype).t())
        return out.view(*inputs.shape[:-1], -1)


class Norm(nn.Module):
    """RMS norm with float32 weight and arithmetic, and its input's type outside.

    What learns is a factor on the weight: the weights' sizes differ too much for one learning rate.
    """

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.register_buffer("start", weight.float())
        self.norm = nn.Parameter(torch.ones_like(self.start))
        self.epsilon = epsilon

    def weight(self) -> torch.Tensor:
        return self.start * self.norm

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out = functional.rms_norm(inputs.float(), self.start.shape, self.weight(), self.epsilon)
        return out.to(inputs.dtype)


class SplitFfn(nn.Module):
    """A split feed-forward network; every expert is computed and the unselected ones weighted zero.

    Slower than skipping them on large machines, but three dense products beat many small ones on a CPU.
    """

    def __init__(self, dense: list[torch.Tensor], own: dict[str, Any], layout: Layout, dtype: torch.dtype):
        super().__init__()
        self.layout = layout
        order = own["permutation"].long()
        self.register_buffer("permutation", order)
        self.router = nn.Parameter(own["router"].float())
        self.register_buffer("start", own["gain"].float())
        self.gain = nn.Parameter(torch.ones_like(self.start))  # a factor, as in Norm
        self.gate = Projection(dense[0][order], own["gate"], dtype)
        self.up = Projection(dense[1][order], own["up"], dtype)
        self.down = Projection(dense[2][:, order], own["down"], dtype)
        self.probabilities: torch.Tensor | None = None  # [T, N] of the latest forward

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        layout = self.layout
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.probabilities = functional.linear(rows.float(), self.router).softmax(-1)
        weights = self.probabilities * selected(self.probabilities, layout.top_k)
        hidden = functional.silu(self.gate(rows)) * self.up(rows) * (self.start * self.gain).to(rows.dtype)
        shared, routed = hidden.split([layout.shared, layout.experts * layout.expert_size], 1)
        routed = routed.view(-1, layout.experts, layout.expert_size) * weights[..., None].to(rows.dtype)
        return self.down(torch.cat([shared, routed.flatten(1)], 1)).view_as(inputs)


def selected(probabilities: torch.Tensor, top_k: int) -> torch.Tensor:
    """[T, N] mask, 1 at the top k of each row."""
    best = probabilities.topk(top_k, -1).indices
    return torch.zeros_like(probabilities).scatter(-1, best, 1.0)


class Student(nn.Module):
    """The dense Llama model, changed in place into what a recipe describes; the recipe's parts learn.

    Args:
        dense: the dense model; it is consumed.
        recipe: where to start; updates that it lacks start at zero.
        ranks: rank of the updates of "ffn" and "attention" where the recipe has none.
        dtype: of the frozen weights and the arithmetic.
        seed: of the updates' first factors.
    """

    def __init__(
        self, dense: Any, recipe: Recipe, ranks: dict[str, int], dtype: torch.dtype, seed: int
    ) -> None:
        super().__init__()
        self.recipe = recipe
        generator = torch.Generator().manual_seed(seed)
        epsilon = dense.config.rms_norm_eps
        dense.requires_grad_(False)
        for number, layer in enumerate(dense.model.layers):
            own = self._own(number)
            weights = {name: getattr(layer.self_attn, f"{name}_proj").weight for name in ATTENTION}
            if number not in recipe.layout.dense_layers:
                weights |= {name: getattr(layer.mlp, f"{name}_proj").weight for name in FFN}
            for name, weight in weights.items():
                rank = ranks["attention" if name in ATTENTION else "ffn"]
                fresh = low_rank(rank, weight.shape[1], weight.shape[0], generator)
                own[name] = {part: own.pop(f"{name}.{part}", fresh[part]) for part in ("a", "b")}
            for name in ATTENTION:
                setattr(layer.self_attn, f"{name}_proj", Projection(weights[name], own[name], dtype))
            if number not in recipe.layout.dense_layers:
                layer.mlp = SplitFfn([weights[name] for name in FFN], own, recipe.layout, dtype)
            layer.input_layernorm = Norm(own["input_norm"], epsilon)
            layer.post_attention_layernorm = Norm(own["ffn_norm"], epsilon)
        dense.model.norm = Norm(recipe.tensors["norm"].clone(), epsilon)
        self.dense = dense
        for name, tensor in dense.named_parameters():
            # Frozen weights only: what trains stays in float32.
            if not tensor.requires_grad:
                tensor.data = tensor.data.to(dtype)
            elif tensor.dtype != torch.float32:
                raise ValueError(f"{name} trains in {tensor.dtype}")

    def _own(self, number: int) -> dict[str, Any]:
        prefix = f"layers.{number}."
        found = {n: t for n, t in self.recipe.tensors.items() if n.startswith(prefix)}
        # Copies: training must not reach the recipe that it started from.
        return {name.removeprefix(prefix): tensor.clone() for name, tensor in found.items()}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, S] token ids → [B, S, D] last hidden states, after the final norm."""
        return self.dense.model(input_ids=ids, use_cache=False).last_hidden_state

    def splits(self) -> list[SplitFfn]:
        return [layer.mlp for layer in self.dense.model.layers if isinstance(layer.mlp, SplitFfn)]

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters by kind: router, gain, norm, update."""
        found: dict[str, list[nn.Parameter]] = {"router": [], "gain": [], "norm": [], "update": []}
        for name, parameter in self.dense.named_parameters():
            if parameter.requires_grad:
                last = name.rsplit(".", 1)[-1]
                found["update" if last in ("a", "b") else last].append(parameter)
        return found

    def export(self, made: dict[str, Any]) -> Recipe:
        """The recipe of the present parameters."""
        tensors: dict[str, torch.Tensor] = {"norm": self.dense.model.norm.weight()}
        for number, layer in enumerate(self.dense.model.layers):
            prefix = f"layers.{number}."
            tensors[prefix + "input_norm"] = layer.input_layernorm.weight()
            tensors[prefix + "ffn_norm"] = layer.post_attention_layernorm.weight()
            parts = {name: getattr(layer.self_attn, f"{name}_proj") for name in ATTENTION}
            if isinstance(layer.mlp, SplitFfn):
                parts |= {name: getattr(layer.mlp, name) for name in FFN}
                tensors[prefix + "permutation"] = layer.mlp.permutation
                tensors[prefix + "router"] = layer.mlp.router
                tensors[prefix + "gain"] = layer.mlp.start * layer.mlp.gain
            for name, part in parts.items():
                tensors |= {f"{prefix}{name}.a": part.a, f"{prefix}{name}.b": part.b}
        copied = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        return Recipe(self.recipe.layout, copied, made)
