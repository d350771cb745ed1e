"""Made-up token sequences, on which a calibration takes as long as on text."""

import torch


def random_sequences(vocabulary: int, tokens: int, seq_len: int) -> list[list[int]]:
    """Token ids with `tokens` positions in all."""
    generator = torch.Generator().manual_seed(0)
    lengths = [seq_len] * (tokens // (seq_len - 1))
    left = tokens - len(lengths) * (seq_len - 1)
    lengths += [left + 1] if left else []
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]
