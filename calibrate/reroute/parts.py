"""Which documents train the router, which choose among the results, and which only judge the chosen one."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass

import torch

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.routes.standard import ScoredText

TRAINED = 0.8  # share of the documents; the others are split in two halves
SHOWN = {"train": "training", "tuning": "choosing", "report": "the held-out report"}


@dataclass(frozen=True, eq=False)
class Parts:
    """Rows of a Problem, [·] int64 each; no document is in two of them."""

    train: torch.Tensor
    tuning: torch.Tensor
    report: torch.Tensor


def split(text: ScoredText, documents: torch.Tensor, seed: int) -> Parts:
    """Deal out positions by their document, by a hash of its tokens: equal documents stay together.

    Args:
        text: the documents.
        documents: [P] int64, the document of each position.
        seed: another one deals them out otherwise.

    Raises:
        CalibrationError: there is no document for one of the parts.
    """
    share = _shares(text, seed)[documents]
    middle = (1 + TRAINED) / 2
    parts = {
        "train": share < TRAINED,
        "tuning": (share >= TRAINED) & (share < middle),
        "report": share >= middle,
    }
    for name, mask in parts.items():
        if not mask.any():
            raise CalibrationError(
                f"{text.name}: none of its {len(set(text.documents))} documents is left for {SHOWN[name]}; "
                "give more documents, or another --seed"
            )
    return Parts(*(mask.nonzero().flatten() for mask in parts.values()))


def _shares(text: ScoredText, seed: int) -> torch.Tensor:
    """For each document a number in [0, 1) that depends on the seed and the document's tokens alone."""
    tokens: dict[int, list[list[int]]] = defaultdict(list)
    for document, ids in zip(text.documents, text.sequences, strict=True):
        tokens[document].append(ids)
    shares = torch.zeros(max(text.documents) + 1, dtype=torch.float64)
    for document, sequences in tokens.items():
        digest = hashlib.blake2b(f"{seed} {sequences}".encode(), digest_size=6).digest()
        shares[document] = int.from_bytes(digest, "little") / (1 << 48)
    return shares
