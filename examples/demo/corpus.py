"""From facts and prose to token sequences: the tokenizer, the packing, the training order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import facts
import numpy as np
import prose
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
SEQUENCE = 128
PROSE_SHARE = 0.36
IGNORED = -100
END, PAD = "<|endoftext|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ 'Question: ' + message['content'] + '\\nAnswer:' }}{% endif %}{% endfor %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCABULARY entries; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def pack(documents: list[list[int]], pad: int) -> np.ndarray:
    """Whole documents into rows of SEQUENCE tokens, first fit among 64 open rows; int32 [rows, SEQUENCE]."""
    rows: list[list[int]] = []
    open_rows: list[list[int]] = []
    for ids in documents:
        ids = ids[:SEQUENCE]
        row = next((row for row in open_rows if len(row) + len(ids) <= SEQUENCE), None)
        if row is None:
            if len(open_rows) == 64:
                rows.append(open_rows.pop(0))
            row = []
            open_rows.append(row)
        row += ids
    rows += open_rows
    packed = np.full((len(rows), SEQUENCE), pad, dtype=np.int32)
    for i, row in enumerate(rows):
        packed[i, : len(row)] = row
    return packed


def prose_rows(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], rows: int, seed: int) -> np.ndarray:
    """``rows`` pieces of SEQUENCE contiguous tokens in seeded order; int32 [rows, SEQUENCE]."""
    stream: list[int] = []
    for ids in tokenizer(list(texts))["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    pieces = np.array(stream[: len(stream) // SEQUENCE * SEQUENCE], dtype=np.int32).reshape(-1, SEQUENCE)
    order = np.random.default_rng(seed).permutation(len(pieces))
    return pieces[order[:rows]]


def training_data(work: Path, seed: int) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray]:
    """Tokenizer, rows int32 [n, SEQUENCE] in training order, and which rows are prose, bool [n]."""
    documents = facts.training_documents(facts.build_facts(), seed)
    texts = list(prose.documents(work, "train").values())
    # The tokenizer sees the tail's names as often as training does, and as much prose as facts.
    tokenizer = train_tokenizer(documents[: len(documents) // 2] + [t[:20_000] for t in texts])
    ends = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(documents)["input_ids"]]
    fact_rows = pack(ends, tokenizer.pad_token_id)
    wanted = round(len(fact_rows) * PROSE_SHARE / (1 - PROSE_SHARE))
    english = prose_rows(tokenizer, texts, wanted, seed)
    rows = np.concatenate([fact_rows, english])
    is_prose = np.arange(len(rows)) >= len(fact_rows)
    order = np.random.default_rng(seed + 2).permutation(len(rows))
    return tokenizer, rows[order], is_prose[order]
