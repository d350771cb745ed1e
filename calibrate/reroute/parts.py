"""Which documents train the router, which choose among the results, and which only judge the chosen one."""

import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.result.statistics import FEWEST_DOCUMENTS
from cor_vllm.calibrate.routes.standard import ScoredText

HELD_OUT = 0.1  # share of the documents that choose, and of those that judge
MOST_HELD_OUT = 0.3  # the same, if a text has so few documents that FEWEST_DOCUMENTS are more than a tenth


@dataclass(frozen=True, eq=False)
class Parts:
    """Rows of a Problem, [·] int64 each; no document is in two of them."""

    train: torch.Tensor
    tuning: torch.Tensor  # what chooses among the results
    report: torch.Tensor  # what judges the chosen one


def split(text: ScoredText, documents: torch.Tensor, seed: int) -> Parts:
    """Deal out positions by their document, in the order of a hash: equal documents stay together.

    Args:
        text: the documents.
        documents: [P] int64, the document of each position.
        seed: another one deals them out otherwise.

    Raises:
        CalibrationError: there are too few documents for three parts.
    """
    digest_of = _digests(text, seed)
    order = {digest: place for place, digest in enumerate(sorted(set(digest_of.values())))}
    count = len(order)
    held_out = max(math.ceil(HELD_OUT * count), min(FEWEST_DOCUMENTS, int(MOST_HELD_OUT * count)))
    if count < 3:
        raise CalibrationError(
            f"{text.name}: has {count} different documents; one each is needed to train, to choose and to "
            "judge, so give more"
        )
    places = torch.zeros(max(digest_of) + 1, dtype=torch.int64)
    for document, digest in digest_of.items():
        places[document] = order[digest]
    place = places[documents]
    masks = (place >= 2 * held_out, (place >= held_out) & (place < 2 * held_out), place < held_out)
    return Parts(*(mask.nonzero().flatten() for mask in masks))


def _digests(text: ScoredText, seed: int) -> dict[int, bytes]:
    """For each document a hash of the seed and its tokens."""
    tokens: dict[int, list[list[int]]] = defaultdict(list)
    for document, ids, positions in zip(text.documents, text.sequences, text.positions, strict=True):
        if positions:
            tokens[document].append(ids)
    return {
        document: hashlib.blake2b(f"{seed} {sequences}".encode(), digest_size=16).digest()
        for document, sequences in tokens.items()
    }
