"""The recipe: what turns the dense SmolLM2 into a mixture of experts, without any of its weights.

Neuron permutation, routers, gains, norms and low-rank updates, in one safetensors file of a few MB. A layer's
feed-forward network is split by neurons: the first ``shared`` of the permutation are the shared expert, the
rest are ``experts`` equal experts. With all experts selected at weight one the split changes nothing.

Names of the tensors (D hidden size, F neurons, N experts, r rank; i the layer):
    layers.i.permutation       [F] int16: neurons of the dense layer, shared expert first
    layers.i.router            [N, D] bfloat16
    layers.i.gain              [F] float32: factor on each permuted neuron's output
    layers.i.{gate,up}.{a,b}   [r, D] and [F, r] bfloat16: the update b @ a; its rows are permuted neurons
    layers.i.down.{a,b}        [r, F] and [D, r] bfloat16: likewise, before the gain
    layers.i.{v,o}.{a,b}       updates of the attention's value and output projections
    layers.i.{input,ffn}_norm  [D] float32, and ``norm``: the norms' weights
A dense layer has no permutation, router, gain, gate, up and down.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FFN = ("gate", "up", "down")
ATTENTION = ("v", "o")
State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """How each feed-forward network is split."""

    shared: int = 512
    experts: int = 16
    expert_size: int = 64
    top_k: int = 10
    dense_layers: tuple[int, ...] = ()

    @property
    def neurons(self) -> int:
        return self.shared + self.experts * self.expert_size


@dataclass(frozen=True, eq=False)
class Recipe:
    """Layout, tensors by the names of this module's docstring, and how they were made."""

    layout: Layout
    tensors: dict[str, torch.Tensor]
    made: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        rounded = {name: stored(name, tensor) for name, tensor in self.tensors.items()}
        # One entry: safetensors writes several in no fixed order.
        metadata = {"recipe": json.dumps({"layout": asdict(self.layout), "made": self.made})}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(rounded, path.with_suffix(".new"), metadata=metadata)
        path.with_suffix(".new").replace(path)

    @staticmethod
    def load(path: Path) -> Recipe:
        with safe_open(path, "pt") as handle:
            metadata = json.loads(handle.metadata()["recipe"])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        layout = metadata["layout"]
        layout["dense_layers"] = tuple(layout["dense_layers"])
        return Recipe(Layout(**layout), tensors, metadata["made"])


def stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the type that the file keeps it in."""
    last = name.rsplit(".", 1)[-1]
    dtype = {"permutation": torch.int16, "router": torch.bfloat16, "a": torch.bfloat16, "b": torch.bfloat16}
    return tensor.detach().cpu().to(dtype.get(last, torch.float32)).contiguous()


def plain_recipe(dense: State, layers: int, layout: Layout) -> Recipe:
    """The recipe that changes nothing but the split: neurons in order, uniform routing, the dense norms.

    A router of zeros gives each expert 1/N, which the gain N makes one: with top_k = N the result is the
    dense model.
    """
    tensors = {"norm": dense["model.norm.weight"]}
    for number in range(layers):
        prefix, source = f"layers.{number}.", f"model.layers.{number}."
        tensors[prefix + "input_norm"] = dense[source + "input_layernorm.weight"]
        tensors[prefix + "ffn_norm"] = dense[source + "post_attention_layernorm.weight"]
        if number in layout.dense_layers:
            continue
        hidden = dense[source + "mlp.gate_proj.weight"].shape[1]
        tensors[prefix + "permutation"] = torch.arange(layout.neurons, dtype=torch.int16)
        tensors[prefix + "router"] = torch.zeros(layout.experts, hidden)
        gain = torch.full((layout.neurons,), float(layout.experts))
        gain[: layout.shared] = 1
        tensors[prefix + "gain"] = gain
    return Recipe(layout, {name: tensor.clone() for name, tensor in tensors.items()}, {})


def update(tensors: State, name: str) -> torch.Tensor | float:
    """The low-rank update b @ a of a projection, float32, or 0 if the recipe has none."""
    if name + ".a" not in tensors:
        return 0.0
    return tensors[name + ".b"].float() @ tensors[name + ".a"].float()


def converted_state(dense: State, recipe: Recipe, layers: int) -> dict[str, torch.Tensor]:
    """The Qwen2-MoE checkpoint's tensors, float32, in its published names.

    Args:
        dense: state of the dense Llama model.
        recipe: what to do with it.
        layers: number of layers.
    """
    state = {
        "model.embed_tokens.weight": dense["model.embed_tokens.weight"].float(),
        "model.norm.weight": recipe.tensors["norm"].float(),
    }
    for number in range(layers):
        source = f"model.layers.{number}."
        own = {
            name.removeprefix(f"layers.{number}."): tensor
            for name, tensor in recipe.tensors.items()
            if name.startswith(f"layers.{number}.")
        }
        state[source + "input_layernorm.weight"] = own["input_norm"].float()
        state[source + "post_attention_layernorm.weight"] = own["ffn_norm"].float()
        for name in ("q", "k", "v", "o"):
            key = f"{source}self_attn.{name}_proj"
            state[key + ".weight"] = dense[key + ".weight"].float() + update(own, name)
            if name != "o":
                # Llama has no such biases; Qwen2's attention, in vLLM, always has them.
                state[key + ".bias"] = torch.zeros(len(dense[key + ".weight"]))
        ffn = [dense[f"{source}mlp.{name}_proj.weight"].float() for name in FFN]
        if number in recipe.layout.dense_layers:
            state |= {f"{source}mlp.{n}_proj.weight": w for n, w in zip(FFN, ffn, strict=True)}
        else:
            state |= {f"{source}mlp.{n}": t for n, t in expert_state(ffn, own, recipe.layout).items()}
    return {name: tensor.contiguous() for name, tensor in state.items()}


def expert_state(dense: list[torch.Tensor], own: State, layout: Layout) -> dict[str, torch.Tensor]:
    """A mixture-of-experts layer's tensors by their names below ``mlp.``.

    Args:
        dense: gate [F, D], up [F, D] and down [D, F] of the dense layer.
        own: the recipe's tensors of this layer.
        layout: the split.
    """
    order = own["permutation"].long()
    gate = dense[0][order] + update(own, "gate")
    up = dense[1][order] + update(own, "up")
    down = (dense[2][:, order] + update(own, "down")) * own["gain"].float()
    shared = slice(0, layout.shared)
    state = {
        "gate.weight": own["router"].float(),
        "shared_expert.gate_proj.weight": gate[shared],
        "shared_expert.up_proj.weight": up[shared],
        # Qwen2-MoE multiplies the shared expert by the sigmoid of a gate: with weight 0 by one half.
        "shared_expert.down_proj.weight": 2 * down[:, shared],
        "shared_expert_gate.weight": torch.zeros(1, gate.shape[1]),
    }
    for expert in range(layout.experts):
        start = layout.shared + expert * layout.expert_size
        rows = slice(start, start + layout.expert_size)
        state[f"experts.{expert}.gate_proj.weight"] = gate[rows]
        state[f"experts.{expert}.up_proj.weight"] = up[rows]
        state[f"experts.{expert}.down_proj.weight"] = down[:, rows]
    return state


def config_of(dense: Any, layout: Layout) -> Any:
    """The Qwen2MoeConfig for a dense LlamaConfig."""
    from transformers import Qwen2MoeConfig

    if layout.neurons != dense.intermediate_size:
        raise ValueError(f"the split has {layout.neurons} neurons, the model {dense.intermediate_size}")
    return Qwen2MoeConfig(
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters=dict(dense.rope_parameters),
        tie_word_embeddings=dense.tie_word_embeddings,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
        num_experts=layout.experts,
        num_experts_per_tok=layout.top_k,
        moe_intermediate_size=layout.expert_size,
        shared_expert_intermediate_size=layout.shared,
        mlp_only_layers=list(layout.dense_layers),
        norm_topk_prob=False,
        architectures=["Qwen2MoeForCausalLM"],
    )


def write_checkpoint(
    folder: Path, config: Any, state: State, dtype: torch.dtype, generation: Any = None
) -> None:
    """Write config.json and model.safetensors, as transformers and vLLM load them.

    Args:
        folder: where to; created if missing.
        config: from `config_of`.
        state: from `converted_state`.
        dtype: type of the weights on disk.
        generation: generation settings to write along, if any.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = dtype
    config.save_pretrained(folder)
    # transformers 5 may write a name of its own; published models, and other readers, say num_experts.
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"num_local_experts"', '"num_experts"'))
    if generation is not None:
        generation.save_pretrained(folder)
    save_file(
        {name: tensor.to(dtype) for name, tensor in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
