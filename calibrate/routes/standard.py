"""Reads a text once: what the untouched model says at every scored position, and its last layer's inputs."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cor_vllm.calibrate.interventions.attention import Places
from cor_vllm.calibrate.model.batches import pad, sequence_batches
from cor_vllm.calibrate.model.layers import Arguments, enter, run
from cor_vllm.calibrate.model.moe_model import LOSS_ROWS, MoeModel
from cor_vllm.calibrate.model.offload import held
from cor_vllm.calibrate.routes.noise import mixed, uniform
from cor_vllm.calibrate.routes.utilities import Standard

_TARGETS = 1 << 20  # keeps the noise of the null targets apart from that of layers


@dataclass(frozen=True, eq=False)
class ScoredText:
    """Token sequences, and which of their positions are scored (position t predicts token t+1)."""

    name: str
    sha256: str
    sequences: list[list[int]]
    positions: list[list[int]]  # of each sequence, ascending
    documents: list[int]  # the document that each sequence belongs to

    def places(self) -> Places:
        """Where the T scored positions stand."""
        pairs = [(s, t) for s, positions in enumerate(self.positions) for t in positions]
        values = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        return Places(values[:, 0], values[:, 1])


@dataclass(frozen=True, eq=False)
class LastInputs:
    """What the last decoder layer's experts get, and what their output is added to, at T positions."""

    x: torch.Tensor  # [T, D], the router's input
    residual: torch.Tensor  # [T, D], residual stream with attention and shared experts


def token_keys(sequences: Sequence[Sequence[int]], places: Places, seed: int) -> torch.Tensor:
    """[T] int64: numbers for the noise that depend on the seed, the sequence's tokens and the position."""
    digests = [hashlib.blake2b(str(list(ids)).encode(), digest_size=8).digest() for ids in sequences]
    of_sequence = torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])
    return mixed(mixed(of_sequence, seed)[places.sequence], places.position + 1)


@torch.inference_mode()
def read_standard(
    model: MoeModel,
    text: ScoredText,
    seed: int,
    nulls: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> tuple[Standard, LastInputs | None]:
    """Run the model once over the text.

    The batches go through the layers together, so that weights which wait in host memory are brought once.

    Args:
        model: the model.
        text: what it reads.
        seed: of the null targets.
        nulls: J, null targets of each position.
        advance: is called with the number of tokens that passed a layer.

    Returns:
        The standard predictions, and the last layer's inputs: None if the last decoder layer has no experts.
    """
    batches = [pad(group) for group in sequence_batches(text.sequences)]
    places = text.places()
    rows = _rows_of_batches(text, batches, places)
    states, arguments = _enter(model, batches)
    layers, last = model.decoder_layers, None
    with model.record_router_logits() as records:
        for index, layer in enumerate(layers):
            with held(layer):
                is_last = index == len(layers) - 1 == model.layer_index[-1]
                inputs: list[torch.Tensor] = []
                outputs: list[torch.Tensor] = []
                hook = _watch_experts(layer, inputs, outputs) if is_last else None
                for b, state in enumerate(states):
                    states[b] = run(layer, state.to(model.device), arguments[b].of_layer[index]).cpu()
                    advance(batches[b].numel())
                if hook is not None:
                    hook.remove()
                    last = _last_inputs(states, inputs, outputs, rows)
    logits = [_picked(of_layer, rows) for of_layer in records]
    keys = token_keys(text.sequences, places, seed)
    tokens = [ids[t + 1] for ids, at in zip(text.sequences, text.positions, strict=True) for t in at]
    with held(model.model.model.norm, model.model.lm_head):
        hidden = _picked([state.flatten(0, 1) for state in states], rows)
        targets, log_prob = _predictions(model, hidden, torch.tensor(tokens), keys, nulls)
    documents = torch.tensor(text.documents)[places.sequence]
    return Standard(places, documents, keys, targets, log_prob, logits), last


def _rows_of_batches(text: ScoredText, batches: list[torch.Tensor], places: Places) -> list[torch.Tensor]:
    """For each batch, the rows of its flattened [B·S] tokens that are scored, in order."""
    rows, start = [], 0
    for batch in batches:
        inside = (places.sequence >= start) & (places.sequence < start + len(batch))
        rows.append((places.sequence[inside] - start) * batch.shape[1] + places.position[inside])
        start += len(batch)
    return rows


def _enter(model: MoeModel, batches: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[Arguments]]:
    with held(model.model.get_input_embeddings()):
        entered = [enter(model.model.model, input_ids.to(model.device)) for input_ids in batches]
    return [hidden.cpu() for hidden, _ in entered], [arguments for _, arguments in entered]


def _picked(batches: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([values[at] for values, at in zip(batches, rows, strict=True)])


def _watch_experts(layer: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> Any:
    """Keep what the experts of a layer are given and return, [B·S, D] of each batch on the host."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        inputs.append(args[0].flatten(0, -2).cpu())
        outputs.append(output.flatten(0, -2).cpu())

    return layer.mlp.experts.register_forward_hook(hook)


def _last_inputs(
    states: list[torch.Tensor],
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor],
    rows: list[torch.Tensor],
) -> LastInputs:
    after = _picked([state.flatten(0, 1) for state in states], rows)
    return LastInputs(_picked(inputs, rows), after.float() - _picked(outputs, rows).float())


def _predictions(
    model: MoeModel, hidden: torch.Tensor, tokens: torch.Tensor, keys: torch.Tensor, nulls: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets [T, 1+J], the realised token and J drawn ones, and their log-probabilities [T, 1+J] float32."""
    targets, log_probs = [], []
    for block in torch.arange(len(hidden)).split(LOSS_ROWS):
        normed = model.model.model.norm(hidden[block].to(model.device))
        log_prob = model.model.lm_head(normed).float().log_softmax(dim=-1)
        drawn = draw_targets(log_prob, keys[block], nulls)
        both = torch.cat([tokens[block, None].to(drawn.device), drawn], dim=1)
        targets.append(both.cpu())
        log_probs.append(log_prob.gather(1, both).cpu())
    return torch.cat(targets), torch.cat(log_probs)


def draw_targets(log_prob: torch.Tensor, keys: torch.Tensor, nulls: int) -> torch.Tensor:
    """Draw null targets from predictions, by noise that depends on the keys alone.

    Args:
        log_prob: [T, V] float32.
        keys: [T] int64.
        nulls: J.

    Returns:
        [T, J] int64 token ids.
    """
    noise = uniform(mixed(keys[:, None], torch.arange(nulls) + _TARGETS))
    cumulated = log_prob.double().exp().cumsum(dim=-1)
    wanted = noise.to(cumulated.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, wanted, right=True).clamp_max(cumulated.shape[1] - 1)
