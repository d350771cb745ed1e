"""Counts, on the device, what the routing does: slots filled, slots changed, distinct experts, steps."""

import torch

COUNTERS = ("slots", "slots_changed", "distinct_experts", "router_steps")  # of one layer, in this order


def count(
    counts: torch.Tensor,
    ids: torch.Tensor,
    own_ids: torch.Tensor | None,
    num_experts: int,
    is_padding: torch.Tensor | None,
) -> None:
    """Add one forward of one layer to its counters, in place and without waiting for the device.

    Only tensor operations of fixed shapes, so that a CUDA graph replays them.

    Args:
        counts: int64 [4], COUNTERS; added to.
        ids: [T, k] integers, the experts of each token; rows of −1 stand for no token.
        own_ids: [T, k], what the model's own score would have chosen; None if that has chosen.
        num_experts: N; ids are below it.
        is_padding: [T] bool, further rows that stand for no token; None if there are no such rows.
    """
    ids = ids.long()
    real = ids >= 0
    if is_padding is not None:
        real = real & ~is_padding[:, None]
    # One column more than experts, in which rows without a token go.
    chosen = _members(torch.where(real, ids, num_experts), num_experts + 1)[:, :num_experts]
    if own_ids is None:
        changed = torch.zeros_like(counts[0])
    else:
        changed = (chosen & ~_members(own_ids.long(), num_experts)).sum()
    counts += torch.stack([real.sum(), changed, chosen.any(dim=0).sum(), real.any().long()])


def _members(ids: torch.Tensor, width: int) -> torch.Tensor:
    """[T, width] bool: which of `width` each row of `ids` [T, k] int64 names."""
    empty = torch.zeros((len(ids), width), dtype=torch.bool, device=ids.device)
    return empty.scatter(1, ids, True)
