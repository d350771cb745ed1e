"""Random numbers that depend on what they are for, not on the order in which they are asked for."""

import torch

from cor_vllm.kernels.reference import mix

_ODD = 0x9E3779B97F4A7C1  # spreads consecutive numbers over all bits


def mixed(keys: torch.Tensor, number: torch.Tensor | int) -> torch.Tensor:
    """New keys, int64, out of keys and a number for each (or one for all): other numbers, unrelated keys."""
    # A tensor, since the product may overflow, which a Python integer may not.
    return mix(keys + torch.as_tensor(number, dtype=torch.int64) * _ODD)


def uniform(keys: torch.Tensor) -> torch.Tensor:
    """A number in (0, 1), ends excluded, for each key: float64, odd multiples of 2⁻⁵³."""
    return ((keys & ((1 << 52) - 1)).double() + 0.5) / (1 << 52)
