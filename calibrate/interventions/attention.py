"""Attention of variants: each attends to its own key and value and to the earlier ones of its sequence.

A variant is a single position whose hidden state an intervention has changed; its sequence is unperturbed.
transformers hands every attention layer's query, key and value, after rotary embedding, to a function that it
looks up by name (ALL_ATTENTION_FUNCTIONS). While `SharedAttention` is installed, that function is `_attend`:
it passes sequences on to the model's own function and computes variants itself.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.model.layers import FOLLOWED, INSTEAD

NAME = "cor_sweep"
# Arguments of the attention function, besides q, k, v and mask, that change nothing here: the mask says what
# a window lets through, and in evaluation mode nothing is dropped.
IGNORED = {"sliding_window", "dropout", "position_ids", "past_key_values", "use_cache", "is_causal"}


@dataclass(frozen=True, eq=False)
class Places:
    """Where R variants stand, row by row; the tensors are on the host."""

    sequence: torch.Tensor  # [R] int64, index into the batch of sequences
    position: torch.Tensor  # [R] int64

    def __getitem__(self, rows: torch.Tensor) -> "Places":
        return Places(self.sequence[rows], self.position[rows])

    def __len__(self) -> int:
        return len(self.sequence)


class SharedAttention:
    """Keys and values of B unperturbed sequences at one layer, and the attention of variants to them.

    Raises:
        CalibrationError: the model's attention is of a kind that this cannot follow; raised here or in a
            layer call.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._own = config._attn_implementation
        if self._own not in FOLLOWED:
            raise CalibrationError(
                f"{config.model_type}: attention implementation {self._own!r} is given no mask to read "
                f"windows from; load the model with sdpa or eager, {INSTEAD}"
            )
        self._recording = False
        self._key = self._value = torch.empty(0)  # [B, heads, S, head size] after rotary embedding
        self._visible = torch.empty(0)  # [S, S] bool: what each position sees before itself
        self._places: Places | None = None
        self._calls = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, every attention layer of the model calls this object."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS[NAME] = self._attend
        self._config._attn_implementation = NAME
        try:
            yield
        finally:
            self._config._attn_implementation = self._own
            del ALL_ATTENTION_FUNCTIONS[NAME]

    @contextmanager
    def record(self, mask: torch.Tensor | None, length: int) -> Iterator[None]:
        """Inside, one layer runs on the unperturbed sequences; their keys and values are kept.

        Args:
            mask: what the model gives this layer: [1, 1, S, S], either bool (True: seen) or additive; None
                means causal.
            length: S, tokens.
        """
        self._visible = visible_before(mask, length)
        self._recording = True
        try:
            with self._one_call():
                yield
        finally:
            self._recording = False

    @contextmanager
    def variants(self, places: Places) -> Iterator[None]:
        """Inside, the same layer runs on one row of variants, [1, R, D], that stand at `places`."""
        self._places = places
        try:
            with self._one_call():
                yield
        finally:
            self._places = None

    def forget(self) -> None:
        """Free the recorded keys and values."""
        self._key = self._value = torch.empty(0)

    @contextmanager
    def _one_call(self) -> Iterator[None]:
        self._calls = 0
        yield
        if self._calls != 1:
            raise CalibrationError(
                f"{self._config.model_type}: a layer called transformers' attention function {self._calls} "
                f"times, not once, so the sweep cannot see its keys and values; {INSTEAD}"
            )

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """What a layer calls: [B, heads, S, head size] each → [B, S, heads, value size]."""
        self._calls += 1
        if self._places is not None:
            return self._of_variants(query[0], key[0], value[0], **options).transpose(0, 1)[None], None
        if self._recording:
            self._key, self._value = key, value
        output, _ = own_function(self._own, module)(module, query, key, value, attention_mask, **options)
        return output, None

    def _of_variants(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        s_aux: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Compute [heads, R, value size], one sequence's variants after the other.

        Args:
            query: [H, R, head size].
            key, value: [Hkv, R, head or value size], the variants' own.
            scaling: the factor of q·k.
            s_aux: [H], GPT-OSS's sinks: a logit of each head that takes probability and adds nothing.
        """
        unknown = [name for name, given in options.items() if given is not None and name not in IGNORED]
        if unknown:
            raise CalibrationError(
                f"{self._config.model_type}: its attention takes {unknown[0]}, which the sweep does not "
                f"know; {INSTEAD}"
            )
        assert self._places is not None, "called only after variants() has set the places"
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        for sequence in self._places.sequence.unique().tolist():
            host_rows = (self._places.sequence == sequence).nonzero().flatten()
            position = self._places.position[host_rows]
            end = int(position.max())  # no variant of this sequence sees further
            rows, visible = host_rows.to(query.device), self._visible[position, :end].to(query.device)
            output[:, rows] = attend_to_own_and_past(
                query[:, rows], key[:, rows], value[:, rows],
                self._key[sequence, :, :end], self._value[sequence, :, :end], visible, scaling, s_aux,
            )  # fmt: skip
        return output


def attend_to_own_and_past(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention of R queries, each to its own key and to the shared past that it may see.

    Args:
        query: [H, R, dk]. key, value: [Hkv, R, dk], [Hkv, R, dv].
        past_key, past_value: [Hkv, T, dk], [Hkv, T, dv].
        visible: [R, T] bool.
        scaling: the factor of q·k.
        sinks: [H], a logit of each head that takes probability and adds nothing; or None.

    Returns:
        [H, R, dv] in the dtype of `value`; the softmax is float32, or float64 if the model is.
    """
    heads, rows, _ = query.shape
    grouped = query.unflatten(0, (len(key), -1))  # [Hkv, H/Hkv, R, dk]: query heads share key heads in order
    past = torch.einsum("hgrd,htd->hgrt", grouped, past_key) * scaling
    own = torch.einsum("hgrd,hrd->hgr", grouped, key)[..., None] * scaling
    logits = [past.masked_fill(~visible, -torch.inf), own]
    if sinks is not None:
        logits.append(sinks.view(len(key), -1, 1, 1).expand(-1, -1, rows, -1).to(own.dtype))
    joined = torch.cat(logits, dim=-1)
    probs = joined.softmax(-1, dtype=torch.promote_types(joined.dtype, torch.float32)).to(value.dtype)
    seen = past.shape[-1]
    output = torch.einsum("hgrt,htd->hgrd", probs[..., :seen], past_value)
    output = output + probs[..., seen, None] * value[:, None]
    return output.reshape(heads, rows, -1)


def visible_before(mask: torch.Tensor | None, length: int) -> torch.Tensor:
    """From a layer's attention mask, which earlier positions (columns) each position (row) sees.

    Returns:
        [S, S] bool on the host.
    """
    before = torch.ones(length, length, dtype=torch.bool).tril(-1)
    if mask is None:
        return before
    seen = mask[0, 0, :length, :length].cpu()
    return before & (seen if seen.dtype == torch.bool else seen == 0)


def own_function(name: str, module: nn.Module) -> Callable[..., tuple[torch.Tensor, Any]]:
    """The attention function that a module would call; each family's own file defines `eager`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., tuple[torch.Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return found
