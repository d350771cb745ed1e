"""Puts sequences together into padded batches, and takes the padding out of what comes back."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

TOKENS_PER_FORWARD = 4096  # padding included


@dataclass(frozen=True)
class Row:
    """One intervention: the sequence it runs on, and the position at which it acts (None: everywhere)."""

    sequence: int
    position: int | None = None
    expert: int = -1


def batches(rows: Sequence[Row], sequences: Sequence[Sequence[int]]) -> Iterator[list[tuple[Row, list[int]]]]:
    """Group rows, in order, with the tokens that they need; a padded batch holds ≤ TOKENS_PER_FORWARD."""
    batch: list[tuple[Row, list[int]]] = []
    for row in rows:
        ids = list(sequences[row.sequence])
        ids = ids if row.position is None else ids[: row.position + 2]
        width = max(len(ids), *(len(other) for _, other in batch)) if batch else len(ids)
        if batch and width * (len(batch) + 1) > TOKENS_PER_FORWARD:
            yield batch
            batch = []
        batch.append((row, ids))
    if batch:
        yield batch


def rows_per_forward(length: int) -> int:
    """How many rows of `length` tokens one forward takes: at least one."""
    return max(1, TOKENS_PER_FORWARD // length)


def pad(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Make [B, S] int64; short rows are filled on the right with id 0, which nothing before it can see."""
    width = max(map(len, sequences))
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in sequences])


def sequence_batches(sequences: Sequence[Sequence[int]]) -> Iterator[list[list[int]]]:
    """Group whole sequences, in order, as `batches` does."""
    for batch in batches([Row(s) for s in range(len(sequences))], sequences):
        yield [ids for _, ids in batch]


def cut(values: Sequence[torch.Tensor], sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Join the values of padded batches, [B, ≥ S−1, …] each, to [P, …] of all positions without padding."""
    rows = [row for batch in values for row in batch]
    return torch.cat([row[: len(ids) - 1] for row, ids in zip(rows, sequences, strict=True)])
