"""ITI: inference-time intervention on attention heads (the paper's second baseline).

    x(l,h) = what head h of layer l gives to the output projection, at one position
    θ      = mean of x over true texts − mean over false ones, of unit length        (mass mean shift)
    σ      = standard deviation of θ·x over all those texts
    x     += α·σ·θ  in the K heads whose linear probe tells true from false best on held-out questions

Source: Li et al. 2023, arXiv 2306.03341; for what it leaves open, the authors' code
(github.com/likenneth/honest_llama: utils.py, validation/validate_2fold.py).
"""

import importlib
import os
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cor_vllm.calibrate.model.batches import pad, sequence_batches
from cor_vllm.calibrate.model.offload import execution_device

FORMAT = "cor-iti/1"
HEADS, OF = 48, 1024  # the paper's K, and the heads of the model that it was chosen on (LLaMA-7B)

Example = tuple[Sequence[int], int, Hashable]
"""Token ids of a question with one answer; 1 if the answer is true, else 0; which question it is."""


@dataclass(frozen=True, eq=False)
class Directions:
    """What `fit` found. K chosen heads of L layers × H heads of D numbers each."""

    heads: torch.Tensor  # [K, 2] int64: layer, head; the best first
    directions: torch.Tensor  # [K, D] float32, θ, of unit length
    scale: torch.Tensor  # [K] float32, σ, in the activation's own unit
    accuracy: torch.Tensor  # [L, H] float32, 0 to 1: every head's probe on the held-out questions

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as a safetensors file."""
        tensors = {name: getattr(self, name).contiguous() for name in _DTYPES}
        save_file(tensors, path, {"format": FORMAT})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Directions":
        """Read such a file.

        Raises:
            ValueError: it is none, or its shapes do not belong together.
        """
        try:
            with safe_open(path, "pt") as file:
                found = (file.metadata() or {}).get("format")
                tensors = {name: file.get_tensor(name) for name in _DTYPES} if found == FORMAT else {}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{os.fspath(path)}: cannot be read ({error}); fit the directions again"
            ) from None
        if not tensors:
            raise ValueError(
                f"{os.fspath(path)}: format is {found!r}, not {FORMAT!r}: fit the directions again"
            )
        return cls(**tensors)

    def __post_init__(self) -> None:
        count, size = self.directions.shape if self.directions.dim() == 2 else (-1, -1)
        grid = self.accuracy.shape if self.accuracy.dim() == 2 else (-1, -1)
        shapes = {"heads": (count, 2), "directions": (count, size), "scale": (count,), "accuracy": grid}
        for name, dtype in _DTYPES.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shapes[name]):
                raise ValueError(
                    f"{name}: {tensor.dtype} {list(tensor.shape)} does not go with {count} directions of "
                    f"{size} numbers: fit the directions again"
                )
        if (self.heads < 0).any() or (self.heads >= torch.tensor(grid)).any():
            raise ValueError(
                f"heads: {self.heads.tolist()} are not all among {list(grid)} layers and heads: fit the "
                "directions again"
            )


_DTYPES = {
    "heads": torch.int64,
    "directions": torch.float32,
    "scale": torch.float32,
    "accuracy": torch.float32,
}


def default_heads(total: int) -> int:
    """K for a model of `total` heads: the paper's 48, or below 1,024 heads its share, 3 in 64; at least 1."""
    return min(HEADS, max(1, round(total * HEADS / OF)))


def fit(
    model: Any,
    examples: Sequence[Example],
    heads: int | None = None,
    *,
    held_out: float = 0.2,
    seed: int = 42,
) -> Directions:
    """Find the heads that tell true answers from false ones, and the direction of truth in each.

    x is read at the last token of each text. One logistic regression a head learns on the questions that are
    not held out; its accuracy on the others ranks the head, equals by layer and head. θ and σ are of all
    examples, as in the code. Never give it questions that are scored afterwards.

    Args:
        model: a transformers `…ForCausalLM` with model.layers[…].self_attn.o_proj.
        examples: texts with their labels and questions. A question's texts are never on both sides.
        heads: K; None: `default_heads`.
        held_out: share of the questions that rank the heads; the paper splits 4 to 1.
        seed: of the split.

    Returns:
        The K best heads, on the CPU.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: an example is empty or its label is neither 0 nor 1, a side of the split lacks true or
            false texts, or the model has fewer heads.
    """
    try:
        linear_model = importlib.import_module("sklearn.linear_model")
    except ImportError:
        raise ImportError("the probes of ITI need scikit-learn: pip install scikit-learn") from None
    projections, per_layer, _ = _projections(model)
    total = len(projections) * per_layer
    count = default_heads(total) if heads is None else heads
    if not 1 <= count <= total:
        raise ValueError(f"heads is {count}: this model has {total}, give 1 to {total}")
    learn, check = _split(examples, held_out, seed)
    labels = torch.tensor([label for _, label, _ in examples])
    found = activations(model, [ids for ids, _, _ in examples])

    def accuracy_of(x: torch.Tensor) -> float:  # [E, D]
        values, truth = x.float().numpy(), labels.numpy()
        probe = linear_model.LogisticRegression(max_iter=1000, random_state=seed)
        return float(probe.fit(values[learn], truth[learn]).score(values[check], truth[check]))

    accuracy = torch.tensor([[accuracy_of(x) for x in layer.unbind(1)] for layer in found.unbind(1)])
    best = accuracy.flatten().argsort(descending=True, stable=True)[:count]
    chosen = torch.stack([best // per_layer, best % per_layer], dim=1)
    values = found[:, chosen[:, 0], chosen[:, 1]].double()  # [E, K, D]
    theta = nn.functional.normalize(values[labels == 1].mean(0) - values[labels == 0].mean(0), dim=-1)
    sigma = (values * theta).sum(-1).std(0, correction=0)
    return Directions(chosen, theta.float(), sigma.float(), accuracy)


def _split(examples: Sequence[Example], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the examples to learn from and of those of the held-out questions."""
    if any(len(ids) == 0 or label not in (0, 1) for ids, label, _ in examples):
        raise ValueError(
            "an example holds no token, or a label other than 0 and 1: leave it out or correct it"
        )
    questions = list(dict.fromkeys(question for _, _, question in examples))
    random.Random(seed).shuffle(questions)
    kept = set(questions[: int(len(questions) * (1 - held_out))])
    sides: tuple[list[int], list[int]] = ([], [])
    for index, (_, _, question) in enumerate(examples):
        sides[question not in kept].append(index)
    if any({examples[index][1] for index in side} != {0, 1} for side in sides):
        raise ValueError(
            f"{len(questions)} questions, {held_out:.0%} held out: one side of the split lacks true or false "
            "texts; give more questions, another share or another seed"
        )
    return sides


def activations(model: Any, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[E, L, H, D] in the model's dtype, on the CPU: x of every head at the last token of each of E texts."""
    projections, heads, size = _projections(model)
    records: list[list[torch.Tensor]] = [[] for _ in projections]
    last = torch.empty(0, dtype=torch.int64)  # of each row of the batch that is running

    def recorder(record: list[torch.Tensor]) -> Callable[..., None]:
        return lambda module, args: record.append(args[0][torch.arange(len(last)), last].cpu())

    with ExitStack() as stack, torch.no_grad():
        for projection, record in zip(projections, records, strict=True):
            stack.callback(projection.register_forward_pre_hook(recorder(record)).remove)
        batches = list(sequence_batches(texts))
        for batch in track(batches, "Reading heads …", console=Console(stderr=True), transient=True):
            last = torch.tensor([len(ids) - 1 for ids in batch])
            input_ids = pad(batch).to(execution_device(model.get_input_embeddings()))
            model.eval().model(input_ids=input_ids, use_cache=False)
    return torch.stack([torch.cat(record).unflatten(1, (heads, size)) for record in records], dim=1)


def _projections(model: Any) -> tuple[list[Any], int, int]:
    """The output projection of every layer, heads per layer, numbers per head.

    The width is the projection's own: with multi-head latent attention a head's values (v_head_dim) are
    narrower than its keys.
    """
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    heads: int = model.config.num_attention_heads
    return projections, heads, projections[0].in_features // heads


@contextmanager
def iti(
    model: Any, directions: Directions, alpha: float = 15.0, rows: torch.Tensor | None = None
) -> Iterator[None]:
    """Inside, the chosen heads give x + α·σ·θ instead of x; logits, losses and routing follow from that.

    Args:
        model: the `…ForCausalLM` that the directions were fitted on.
        directions: from `fit` or `Directions.load`.
        alpha: α, in standard deviations; 15 in the paper, chosen for LLaMA-7B. 0 changes no logit.
        rows: [B, S] bool, the positions that are shifted; None: all. The authors' code shifts, when it scores
            multiple choice, from the answer's first tokens on and leaves the question as it is.

    Raises:
        ValueError: the directions are of a model with other layers or heads.
    """
    projections, heads, size = _projections(model)
    own = [len(projections), heads, size]
    fitted = [*directions.accuracy.shape, directions.directions.shape[1]]
    if own != fitted:
        raise ValueError(
            f"the directions are of a model with {fitted} layers, heads and numbers per head; this one has "
            f"{own}: fit them on this model"
        )
    shift = torch.zeros(own)
    shift[directions.heads[:, 0], directions.heads[:, 1]] = (
        alpha * directions.scale[:, None] * directions.directions
    )
    with ExitStack() as stack:
        for layer in directions.heads[:, 0].unique().tolist():
            hook = projections[layer].register_forward_pre_hook(_shift(shift[layer].flatten(), rows))
            stack.callback(hook.remove)
        yield


def _shift(amount: torch.Tensor, rows: torch.Tensor | None) -> Callable[..., tuple[torch.Tensor, ...]]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, *others = args  # [B, S, H·D]
        shifted = hidden + amount.to(hidden)
        if rows is not None:
            shifted = torch.where(rows.to(hidden.device)[:, :, None], shifted, hidden)
        return (shifted, *others)

    return hook
