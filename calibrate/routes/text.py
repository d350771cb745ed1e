"""Makes the token sequences of a route analysis, and keeps which document each of them belongs to."""

from collections.abc import Sequence
from pathlib import Path

from cor_vllm.calibrate.config import DEFAULT_CORPUS, CalibrationError
from cor_vllm.calibrate.routes.options import TextOptions
from cor_vllm.calibrate.routes.standard import ScoredText
from cor_vllm.calibrate.text.corpus import (
    draw_windows,
    load_corpus,
    read_token_ids,
)
from cor_vllm.calibrate.text.inputs import Tokenizer
from cor_vllm.calibrate.text.pairs import asked, read_answers, read_trajectories, take_pairs


def read_scored_text(options: TextOptions, folder: Path, vocab_size: int) -> ScoredText:
    """Read the text that the options name, up to --num-tokens positions of it.

    All positions of a corpus or of given token ids are scored; of answers and trajectories only those that
    predict the answer or completion. A document is a document of the corpus, a list of token ids, or all
    records with the same question or prompt. A text that holds fewer positions is read as a whole.

    Args:
        options: which text, how much of it, and the seed of its order.
        folder: the model's folder, for its tokenizer; not needed if token ids are given.
        vocab_size: token ids must stay below it.

    Raises:
        CalibrationError: the text cannot be read, is malformed, or has no position.
    """
    if options.token_ids is not None:
        sequences, sha256 = read_token_ids(options.token_ids, vocab_size)
        positions = [list(range(len(ids) - 1)) for ids in sequences]
        return ScoredText(options.token_ids.name, sha256, sequences, positions, list(range(len(sequences))))
    if options.answers is not None:
        items, sha256 = read_answers(options.answers)
        pairs = [asked(question, answer) for question, answer in items]
        return _completions(options, folder, options.answers.name, sha256, pairs)
    if options.trajectories is not None:
        pairs, sha256 = read_trajectories(options.trajectories, options.verified)
        return _completions(options, folder, options.trajectories.name, sha256, pairs)
    return _windows(options, folder)


def check_lengths(text: ScoredText, longest: int) -> None:
    """Raise a CalibrationError if a sequence has more tokens than the model reads."""
    found = max(map(len, text.sequences))
    if found > longest:
        raise CalibrationError(
            f"{text.name}: a sequence has {found} tokens, this model reads at most {longest}; leave it out, "
            "or lower --seq-len if the text is a corpus"
        )


def _windows(options: TextOptions, folder: Path) -> ScoredText:
    corpus = load_corpus(options.corpus or DEFAULT_CORPUS)
    tokenizer = Tokenizer(folder)
    wanted = options.num_tokens
    sequences: list[list[int]] = []
    documents: list[int] = []
    for window in draw_windows(
        corpus, tokenizer, tokenizer.prefix, options.seq_len, options.num_tokens, options.seed
    ):
        if wanted <= 0:
            break
        sequences.append(window.ids[: wanted + 1])
        documents.append(window.document)
        wanted -= len(sequences[-1]) - 1
    positions = [list(range(len(ids) - 1)) for ids in sequences]
    return _some(ScoredText(corpus.name, corpus.sha256, sequences, positions, documents))


def _completions(
    options: TextOptions, folder: Path, name: str, sha256: str, pairs: Sequence[tuple[str, str]]
) -> ScoredText:
    tokenizer = Tokenizer(folder)
    taken = take_pairs(pairs, tokenizer, tokenizer.prefix, options.num_tokens, options.seed)
    number_of: dict[str, int] = {}
    numbers = [number_of.setdefault(prompt, len(number_of)) for prompt, _ in pairs]
    return _some(
        ScoredText(
            name,
            sha256,
            [pair.ids for pair in taken],
            [pair.positions for pair in taken],
            [numbers[pair.number] for pair in taken],
        )
    )


def _some(text: ScoredText) -> ScoredText:
    if not any(text.positions):
        raise CalibrationError(f"{text.name}: holds no position that predicts a token; give more text")
    return text
