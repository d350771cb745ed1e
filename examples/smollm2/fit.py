"""The first, layer-by-layer part of the conversion: the split, the routers, a correction of the output.

Layer by layer, on the activations of the layers converted so far:
1. The neurons with the largest contributions are the shared expert; co-activation clusters the others.
2. The router and a scale per expert learn to reconstruct the dense layer's output from the top k experts.
3. A low-rank update of the output projection takes back what can be predicted of the remaining error of the
   residual stream, that of earlier layers included (reduced-rank ridge regression).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from recipe import Layout, Recipe, plain_recipe
from student import selected
from torch.nn import functional

ROUTER_STEPS = 200
TARGET_STEPS = 80  # of these, on the oracle's selection alone
TOKENS_A_STEP = 1024
RIDGE = 0.1  # of the mean and of each neuron's own variance
CHUNK = 2048  # tokens at a time where [T, N, D] is needed


def contributions(hidden: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """[T, F] length of each neuron's part of the output; hidden [T, F], down [D, F]."""
    return hidden.abs() * down.norm(dim=0)


def balanced_clusters(features: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Rows ordered by cluster, all clusters of one size: k-means whose most decided rows choose first.

    Args:
        features: [n, q]; n is a multiple of ``clusters``.
        clusters: how many.
        generator: draws the first centres.
    """
    rows = len(features)
    centres = features[torch.randperm(rows, generator=generator)[:clusters]]
    labels = torch.zeros(rows, dtype=torch.long)
    for _ in range(12):
        distances = torch.cdist(features, centres)
        decided = distances.topk(2, largest=False).values.diff(dim=1).squeeze(1)
        wishes, room = distances.argsort(1).tolist(), [rows // clusters] * clusters
        for row in decided.argsort(descending=True).tolist():
            labels[row] = next(wish for wish in wishes[row] if room[wish])
            room[int(labels[row])] -= 1
        centres = torch.stack([features[labels == label].mean(0) for label in range(clusters)])
    return labels.argsort(stable=True)


def split_neurons(parts: torch.Tensor, layout: Layout, seed: int) -> torch.Tensor:
    """[F] permutation: the shared expert's neurons, then the experts', from contributions [T, F]."""
    strength = parts.pow(2).mean(0)
    hot = strength.topk(layout.shared).indices
    cold = torch.ones(len(strength), dtype=torch.bool).index_fill(0, hot, False).nonzero().flatten()
    profile = parts[:, cold]
    profile = profile / profile.norm(dim=0).clamp_min(1e-9)
    profile = (profile - profile.mean(0)).T  # [n, T]
    left, singular, _ = torch.svd_lowrank(profile, q=min(24, *profile.shape), niter=2)
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([hot, cold[balanced_clusters(left * singular, layout.experts, generator)]])


def expert_gram(routed: torch.Tensor, down: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[T, N, N] inner products of the experts' outputs; routed [T, N·size], down [D, N·size]."""
    weight = down.T.reshape(layout.experts, layout.expert_size, -1)
    grams = []
    for rows in routed.split(CHUNK):
        outputs = torch.einsum(
            "tns,nsd->tnd", rows.view(len(rows), layout.experts, layout.expert_size), weight
        )
        grams.append(outputs @ outputs.transpose(1, 2))
    return torch.cat(grams)


def lost(gram: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[T] squared error of the weighted experts against all experts at weight one: (1 - w)' G (1 - w)."""
    missing = 1 - weights
    return ((gram * missing[:, None]).sum(-1) * missing).sum(-1)


def fit_router(
    inputs: torch.Tensor, gram: torch.Tensor, energy: torch.Tensor, top_k: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Router [N, D] and scales [N] with which the top k experts reconstruct the sum of all.

    Args:
        inputs: [T, D], what the router sees.
        gram: [T, N, N], from `expert_gram`.
        energy: [T], squared length of the layer's whole output; errors count relative to it.
        top_k: experts selected.
        seed: of the tokens drawn.
    """
    experts = gram.shape[1]
    gains = 2 * gram.sum(2) - torch.diagonal(gram, dim1=1, dim2=2)  # what each alone takes off the error
    target = selected(gains, top_k) / top_k
    router = torch.zeros(experts, inputs.shape[1], device=inputs.device, requires_grad=True)
    scale = torch.full((experts,), float(top_k), device=inputs.device).log().requires_grad_()
    groups: list[dict[str, Any]] = [{"params": [router], "lr": 2e-2}, {"params": [scale], "lr": 1e-2}]
    optimizer = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(seed)
    for step in range(ROUTER_STEPS):
        pick = torch.randint(len(inputs), (min(TOKENS_A_STEP, len(inputs)),), generator=generator)
        logits = inputs[pick] @ router.T
        probabilities = logits.softmax(-1)
        loss = -(target[pick] * logits.log_softmax(-1)).sum(-1).mean()
        if step >= TARGET_STEPS:
            mask = selected(probabilities, top_k)
            error = lost(gram[pick], probabilities * mask * scale.exp()) / energy[pick]
            outside = (probabilities * (1 - mask)).sum(-1).mean()
            uneven = experts * probabilities.mean(0).pow(2).sum()
            loss = error.mean() + 0.01 * (loss + outside + uneven)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == TARGET_STEPS:
            optimizer.param_groups[0]["lr"] = 1e-2
        if step == ROUTER_STEPS - 50:
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 2e-3
    return router.detach(), scale.detach().exp()


def low_rank_ridge(
    hidden: torch.Tensor, error: torch.Tensor, importance: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(a [r, F], b [D, r]) with hidden @ (b @ a).T closest to error, tokens weighted, ridge-regularised."""
    root = importance.sqrt()[:, None]
    covariance = (hidden * root).T @ (hidden * root)
    own = covariance.diagonal()
    ridge = covariance + torch.diag(RIDGE * own + RIDGE * own.mean() + 1e-9)
    full = torch.linalg.solve(ridge, (hidden * root).T @ (error * root))  # [F, D]
    basis = torch.linalg.eigh(full.T @ covariance @ full).eigenvectors[:, -rank:]  # [D, r]
    factor = (full @ basis).T
    # Both factors of one size, so that one learning rate suits both.
    size = factor.norm(dim=1, keepdim=True).clamp_min(1e-12).sqrt()
    return factor / size, basis * size.T


def checked_ridge(
    hidden: torch.Tensor, error: torch.Tensor, importance: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`low_rank_ridge` on three quarters of the tokens, shrunk to what holds on the others.

    Unshrunk, it fitted noise: the model got worse.
    """
    train, test = (slice(None, len(hidden) * 3 // 4), slice(len(hidden) * 3 // 4, None))
    a, b = low_rank_ridge(hidden[train], error[train], importance[train], rank)
    found = hidden[test] @ (b @ a).T
    weight = importance[test, None]
    held = (weight * found * error[test]).sum() / (weight * found * found).sum().clamp_min(1e-12)
    root = held.clamp(0, 1).sqrt()
    return a * root, b * root


class LayerFit:
    """Runs the dense model and the model converted so far side by side over the layers.

    Args:
        dense: the dense model in float32; not changed.
        ids: [B, S] token ids.
        layout: the split.
        rank: of the output correction.
        seed: of everything drawn.
    """

    def __init__(self, dense: Any, ids: torch.Tensor, layout: Layout, rank: int, seed: int) -> None:
        self.dense, self.layout, self.rank, self.seed = dense, layout, rank, seed
        self.recipe = plain_recipe(dense.state_dict(), dense.config.num_hidden_layers, layout)
        self.exact = dense.model.embed_tokens(ids)
        self.converted = self.exact.clone()
        self.rotary = dense.model.rotary_emb(self.exact, torch.arange(ids.shape[1], device=ids.device)[None])

    def attention(self, layer: Any, states: torch.Tensor) -> torch.Tensor:
        parts = [
            part
            + layer.self_attn(
                layer.input_layernorm(part), position_embeddings=self.rotary, attention_mask=None
            )[0]
            for part in states.split(16)
        ]
        return torch.cat(parts)

    def step(self, number: int) -> str:
        """Fit one layer and return a line about it."""
        layer = self.dense.model.layers[number]
        exact = self.attention(layer, self.exact)
        self.exact = exact + layer.mlp(layer.post_attention_layernorm(exact))
        states = self.attention(layer, self.converted)
        rows = layer.post_attention_layernorm(states).flatten(0, 1)
        if number in self.layout.dense_layers:
            self.converted = states + layer.mlp(rows).view_as(states)
            return f"layer {number}: dense"
        length = self.exact.flatten(0, 1).pow(2).sum(-1)
        importance = (length.mean() / length).clamp(max=20)
        hidden, down = self.split(number, layer.mlp, rows, importance)
        shared = self.layout.shared
        energy = (hidden @ down.T).pow(2).sum(-1).clamp_min(1e-6)
        gram = expert_gram(hidden[:, shared:], down[:, shared:], self.layout)
        with torch.enable_grad():
            router, scale = fit_router(rows, gram, energy, self.layout.top_k, self.seed + number)
        probabilities = (rows @ router.T).softmax(-1)
        weights = probabilities * selected(probabilities, self.layout.top_k) * scale
        error = (lost(gram, weights) / energy).mean()
        hidden[:, shared:] *= weights.repeat_interleave(self.layout.expert_size, 1)
        missing = (self.exact - states).flatten(0, 1) - hidden @ down.T
        a, b = checked_ridge(hidden, missing, importance, self.rank)
        own = {"router": router, "down.a": a, "down.b": b}
        self.recipe.tensors.update({f"layers.{number}.{name}": tensor.cpu() for name, tensor in own.items()})
        gain = self.recipe.tensors[f"layers.{number}.gain"]
        gain[shared:] = scale.cpu().repeat_interleave(self.layout.expert_size)
        self.converted = states + (hidden @ (down + b @ a).T).view_as(states)
        apart = (self.converted - self.exact).pow(2).sum(-1) / self.exact.pow(2).sum(-1)
        top = probabilities.sort(-1, descending=True).values
        gap = (top[:, self.layout.top_k - 1] - top[:, self.layout.top_k]).median()
        return f"layer {number}: output error {error:.3f}, stream error {apart.mean():.4f}, gap {gap:.4f}"

    def split(
        self, number: int, mlp: Any, rows: torch.Tensor, importance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Permuted hidden activations [T, F] and output projection [D, F]; notes the permutation."""
        hidden = functional.silu(mlp.gate_proj(rows)) * mlp.up_proj(rows)
        parts = contributions(hidden, mlp.down_proj.weight) * importance.sqrt()[:, None]
        # Every fourth token is enough to find what fires together.
        order = split_neurons(parts[::4].cpu(), self.layout, self.seed + number)
        self.recipe.tensors[f"layers.{number}.permutation"] = order.to(torch.int16)
        order = order.to(hidden.device)
        return hidden[:, order], mlp.down_proj.weight[:, order]


@torch.no_grad()
def fit_layers(
    dense: Any, ids: torch.Tensor, layout: Layout, rank: int, seed: int, say: Callable[[str], None]
) -> Recipe:
    """The layer-by-layer recipe, on token ids [B, S]; ``say`` gets a line a layer."""
    fitting = LayerFit(dense, ids, layout, rank, seed)
    for number in range(dense.config.num_hidden_layers):
        say(fitting.step(number))
    return fitting.recipe
