"""DoLa: decoding by contrasting layers, for scoring text (the paper's first baseline).

    q_j(x) = softmax(head(norm(h_j)))         what the model would say after j layers; q_N is its own answer
    j*     = argmax over the candidates of JSD(q_N ‖ q_j)                                          (Eq. 3)
    F(x)   = log q_N(x) − log q_j*(x)  where q_N(x) ≥ α·max q_N, else the filter's value         (Eq. 4, 5)

Source: Chuang et al. 2023, arXiv 2309.03883; for what equations leave open, the authors' code
(github.com/voidism/DoLa: dola.py, tfqa_mc_eval.py, factor_eval.py). Where they differ, an argument decides.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from cor_vllm.calibrate.model.offload import held

ROWS = 128  # positions contrasted at one time: 77 MB a tensor at 150,000 words in float32, about six of them


def candidate_layers(config: Any, half: Literal["low", "high"] = "high") -> list[int]:
    """The premature layers to choose among, by the paper's buckets.

    Layer j is the hidden state after j of N decoder layers: 0 the embeddings, N the model's own answer.
    Candidates are even. "high": the upper half, for short answers (TruthfulQA); "low": the lower half, for
    long text and reasoning (FACTOR, StrategyQA, GSM8K). Above 40 layers a bucket is 20 layers wide, the last
    or the first 20. That gives the authors' own lists for 32, 40, 60 and 80 layers. Tied embeddings: without
    layer 0, which would only repeat its input.

    Args:
        config: a transformers configuration.
        half: which bucket.

    Raises:
        ValueError: so few layers that the bucket is empty.

    Source: section 3.1 of the paper; `--early-exit-layers` in the README of its code.
    """
    layers = config.num_hidden_layers
    width = layers // 2 if layers <= 40 else 20
    found = range(width) if half == "low" else range(layers // 2 if layers <= 40 else layers - width, layers)
    lowest = 1 if config.tie_word_embeddings else 0
    candidates = [layer for layer in found if layer % 2 == 0 and layer >= lowest]
    if not candidates:
        raise ValueError(f"{layers} layers have no {half} bucket of even layers to contrast: give `layers`")
    return candidates


@contextmanager
def dola(
    model: Any,
    layers: Sequence[int] | None = None,
    *,
    relative_top: float = 0.1,
    relative_top_value: float = -1000.0,
    post_softmax: bool = True,
    final_norm: bool = True,
    reversed_divergence: bool = False,
) -> Iterator[None]:
    """Inside, `model(input_ids).logits` are DoLa's scores: [B, S, V] float32, nats, instead of logits.

    Every position of every row is contrasted, so a text's score is the sum of its tokens' entries. Padding on
    the right changes nothing before it. Other interventions of the model (routing, ITI) act as without it, on
    the final and on the premature answer alike. `logits_to_keep` works; `labels` and `inputs_embeds` do not.

    Args:
        model: a transformers `…ForCausalLM` with model.layers, model.norm and lm_head.
        layers: candidates, 0 to N; a single one is DoLa-static; None: `candidate_layers(config, "high")`.
            Equal divergences: the first.
        relative_top: α of the plausibility constraint, a share of the likeliest token's probability; 0: none.
            0.1 in the paper and for FACTOR; the code's default for TruthfulQA's multiple choice is 0.
        relative_top_value: the score of implausible tokens, as the code has it: −∞, which Eq. 4 has, would
            lose every answer that holds one such token. Answers are then compared by how many they hold.
        post_softmax: whether F is renormalised over the vocabulary (Eq. 4), before the filter is applied, as
            in the code. True is the code's default and FACTOR's; the paper's numbers on TruthfulQA's
            multiple choice need False (issue 7 of the code: MC2 63.8 without, 52.2 with).
        final_norm: whether premature states pass the model's last norm. The code leaves it out (issue 9),
            which makes early answers nearly uniform; with it, they are what an early exit would say.
        reversed_divergence: choose the layer by ½KL(m‖q_N) + ½KL(m‖q_j), m = ½(q_N + q_j), as the code does,
            in place of Eq. 3's ½KL(q_N‖m) + ½KL(q_j‖m).

    Raises:
        ValueError: no such layer, or α outside [0, 1].
        RuntimeError: inside, a call that the contrast cannot reach, such as `MoeModel.losses`.
    """
    if not 0 <= relative_top <= 1:
        raise ValueError(f"relative_top is {relative_top}: give a share of the likeliest token, 0 to 1")
    settings = _Settings(relative_top, relative_top_value, post_softmax, final_norm, reversed_divergence)
    contrast = _Contrast(model, candidate_layers(model.config) if layers is None else layers, settings)
    with ExitStack() as stack:
        for layer in contrast.layers:
            # The next module's input: what every hook on the layer's output has made of it.
            reader = [*model.model.layers, model.model.norm][layer]
            recorder = contrast.recorder(layer)
            stack.callback(reader.register_forward_pre_hook(recorder, with_kwargs=True).remove)
        stack.callback(model.register_forward_pre_hook(contrast.begin, with_kwargs=True).remove)
        stack.callback(model.model.register_forward_pre_hook(contrast.check).remove)
        stack.callback(model.register_forward_hook(contrast.end, with_kwargs=True).remove)
        yield


@dataclass(frozen=True)
class _Settings:
    relative_top: float
    relative_top_value: float
    post_softmax: bool
    final_norm: bool
    reversed_divergence: bool


class _Contrast:
    """The hooks of one `dola` context and the hidden states of the forward that is running."""

    def __init__(self, model: Any, layers: Sequence[int], settings: _Settings) -> None:
        depth = len(model.model.layers)
        if not layers or not all(0 <= layer <= depth for layer in layers):
            raise ValueError(f"layers {list(layers)}: give one or more of 0 (the embeddings) to {depth}")
        self.model, self.layers, self.settings = model, list(dict.fromkeys(layers)), settings
        self.states: dict[int, torch.Tensor] = {}  # [B, S, D], before the last norm
        self.running = False

    def recorder(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.states[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for name in ("labels", "inputs_embeds"):
            if kwargs.get(name) is not None:
                raise RuntimeError(f"inside dola, {name} would not see the contrast: call model(input_ids)")
        self.running = True

    def check(self, module: nn.Module, args: Any) -> None:
        if not self.running:
            raise RuntimeError(
                "inside dola, hidden states are asked for without logits (MoeModel.losses does that), which "
                "the contrast cannot reach: score by model(input_ids).logits"
            )

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        states, self.states, self.running = self.states, {}, False
        kept = kwargs.get("logits_to_keep", 0)
        where = slice(-kept, None) if isinstance(kept, int) else kept  # transformers' own reading of it
        flat = [states[layer][:, where].flatten(0, 1) for layer in self.layers]
        logits = output.logits.flatten(0, 1)
        scores = torch.empty_like(logits, dtype=torch.float32)
        with torch.no_grad(), held(self.model.lm_head, self.model.model.norm):
            for start in range(0, len(logits), ROWS):
                part = slice(start, start + ROWS)
                scores[part] = self._scores(logits[part], [hidden[part] for hidden in flat])
        output.logits = scores.view(output.logits.shape)
        return output

    def _scores(self, logits: torch.Tensor, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """F [R, V] float32 of the model's own logits [R, V] and [R, D] hidden states of each candidate."""
        final, settings = logits.float().log_softmax(-1), self.settings
        chosen = self._answer(hidden[0], final)
        furthest = _divergence(final, chosen, settings.reversed_divergence)
        for state in hidden[1:]:
            premature = self._answer(state, final)
            divergence = _divergence(final, premature, settings.reversed_divergence)
            chosen = torch.where((divergence > furthest)[:, None], premature, chosen)
            furthest = torch.maximum(divergence, furthest)
        scores = final - chosen
        if settings.post_softmax:
            scores = scores.log_softmax(-1)
        if settings.relative_top > 0:
            least = final.amax(-1, keepdim=True) + math.log(settings.relative_top)
            scores = scores.masked_fill(final < least, settings.relative_top_value)
        return scores

    def _answer(self, hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """log q_j [R, V] float32 on the device of `like`, of [R, D] hidden states."""
        if self.settings.final_norm:
            hidden = self.model.model.norm(hidden)
        logits: torch.Tensor = self.model.lm_head(hidden)
        return logits.to(like.device, torch.float32).log_softmax(-1)


def _divergence(final: torch.Tensor, premature: torch.Tensor, reverse: bool) -> torch.Tensor:
    """[R] of log-probabilities [R, V], nats: JSD, or with `reverse` the mixture's divergence from both."""
    mixture = torch.logaddexp(final, premature) - math.log(2)
    if reverse:
        return (mixture.exp() * (mixture - (final + premature) / 2)).sum(-1)
    return ((final.exp() * (final - mixture)).sum(-1) + (premature.exp() * (premature - mixture)).sum(-1)) / 2
