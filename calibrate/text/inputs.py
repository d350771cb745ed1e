"""Makes the token sequences of a calibration, from text and a tokenizer or from files of token ids."""

from dataclasses import dataclass, replace
from pathlib import Path

from cor_vllm.calibrate.config import DEFAULT_CORPUS, CalibrationError, CalibrationOptions
from cor_vllm.calibrate.model.loading import load_tokenizer
from cor_vllm.calibrate.text.corpus import (
    draw,
    load_corpus,
    read_positions,
    read_token_ids,
)
from cor_vllm.calibrate.text.pairs import draw_answers, read_answers


@dataclass(frozen=True, eq=False)
class Inputs:
    """The sequences that a calibration measures and is checked on."""

    name: str  # the corpus's, or the name of the file of token ids
    sha256: str  # of the file's bytes
    sequences: list[list[int]]  # to calibrate on
    hard_positions: list[list[int]] | None  # one list per calibration sequence, instead of the percentile
    heldout: list[list[int]]  # empty: no held-out check
    tuning: list[list[int]]  # the half of the held-out positions that --tune looks at
    heldout_corpus: str | None = None


def read_inputs(options: CalibrationOptions, folder: Path, vocab_size: int) -> Inputs:
    """Draw calibration and held-out sequences, or read the given ones.

    With --answers, held-out positions come from --corpus. With --token-ids, all of the file's sequences are
    calibrated on; held-out positions come from --corpus if that is given, too, else there are none.

    Args:
        options: corpus, sizes, seed.
        folder: the model's folder, for its tokenizer; not needed if all ids are given.
        vocab_size: token ids must stay below it.

    Raises:
        CalibrationError: the input cannot be read, is malformed, or is too short.
    """
    if options.answers is not None:
        tokenizer = Tokenizer(folder)
        items, sha256 = read_answers(options.answers)
        sequences, hard = draw_answers(items, tokenizer, tokenizer.prefix, options.num_tokens, options.seed)
        inputs = Inputs(options.answers.name, sha256, sequences, hard, [], [])
        return _with_heldout(inputs, options, tokenizer)
    if options.token_ids is None:
        corpus = load_corpus(options.corpus or DEFAULT_CORPUS)
        tokenizer = Tokenizer(folder)
        parts = [options.num_tokens, *_heldout_parts(options)]
        sequences, tuning, heldout = draw(
            corpus, tokenizer, tokenizer.prefix, options.seq_len, parts, options.seed
        )
        return Inputs(corpus.name, corpus.sha256, sequences, None, heldout, tuning, corpus.name)
    sequences, sha256 = read_token_ids(options.token_ids, vocab_size)
    given = read_positions(options.positions, sequences) if options.positions else None
    inputs = Inputs(options.token_ids.name, sha256, sequences, given, [], [])
    return _with_heldout(inputs, options, Tokenizer(folder)) if options.heldout_corpus else inputs


def _with_heldout(inputs: Inputs, options: CalibrationOptions, tokenizer: "Tokenizer") -> Inputs:
    if options.heldout_corpus is None:
        return inputs
    corpus = load_corpus(options.heldout_corpus)
    tuning, heldout = draw(
        corpus, tokenizer, tokenizer.prefix, options.seq_len, _heldout_parts(options), options.seed
    )
    return replace(inputs, heldout=heldout, tuning=tuning, heldout_corpus=corpus.name)


def _heldout_parts(options: CalibrationOptions) -> list[int]:
    """How many positions to tune on, and how many to report on."""
    half = options.heldout_tokens // 2 if options.tune else 0
    return [half, options.heldout_tokens - half]


class Tokenizer:
    """Text → token ids without special tokens.

    Args:
        folder: the model's folder.

    Raises:
        CalibrationError: it has no usable tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer = load_tokenizer(folder)
        except CalibrationError as error:
            raise CalibrationError(f"{error}, or give --token-ids") from None
        # A model trained with a BOS before every text must see it before every window, or the first
        # positions are measured out of distribution.
        bos = self._tokenizer.bos_token_id
        self.prefix = [bos] if bos is not None and self._tokenizer("").input_ids[:1] == [bos] else []

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids
