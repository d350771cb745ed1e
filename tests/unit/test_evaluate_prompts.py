"""The same prompts on every back end: how they begin, where they are cut, and that it is counted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing

from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.evaluate.harness import server_model, transformers_model
from cor_vllm.evaluate.prompts import Fitted, is_cut, new_tokens, resolve_limit
from cor_vllm.evaluate.runs import Column, Run
from cor_vllm.evaluate.verdict import check_same_prompts
from cor_vllm.testing.tiny_models import byte_tokenizer, create
from tests import fake_server
from tests.fake_server import Fake

LIMIT = 40
LONG = "a text that is longer than all that fits. " * 3


@pytest.fixture(scope="module")
def model() -> MoeModel:
    return MoeModel(create("qwen3_moe"))


def tokenizer(begins: bool) -> Any:
    """Bytes; perhaps every text begins with <s>, as for Llama's, Mixtral's and DeepSeek's tokenizers."""
    found = byte_tokenizer()
    if begins:
        found.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", found.bos_token_id)]
        )
    return found


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_server.running(Fake("m", "m")) as server:
        yield server


@pytest.mark.parametrize("begins", [False, True])
def test_a_server_is_asked_what_transformers_is_asked(
    model: MoeModel, fake: Fake, tmp_path: Path, begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer(begins).save_pretrained(tmp_path)
    here = transformers_model(model, tokenizer(begins), 1, LIMIT)
    there = server_model(str(tmp_path), fake.url, "m", 1, LIMIT)
    seen: list[list[int]] = []

    def generate(context: Any, **options: Any) -> Any:
        seen.append(context[0].tolist())
        return context

    monkeypatch.setattr(here, "_model_generate", generate)
    call = here._model_call
    monkeypatch.setattr(here, "_model_call", lambda ids: seen.append(ids[0].tolist()) or call(ids))
    pairs = [("short", " one"), (LONG, " two"), ("", "nothing before"), ("<s>said", " once"), ("ends ", "so")]
    for lm in (here, there):
        lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    # transformers does not read the last token, of which it asks the score.
    asked = sorted(prompt[:-1] for prompt in fake.prompts)
    assert sorted(seen) == asked and max(map(len, fake.prompts)) == LIMIT - 1
    seen.clear(), fake.prompts.clear()
    for generation in ({"until": ["."], "max_gen_toks": 10}, {"max_new_tokens": 30}):
        for lm in (here, there):
            requests = [Instance("generate_until", {}, (text, dict(generation)), 0) for text in ("hi", LONG)]
            lm.generate_until(requests, disable_tqdm=True)
    assert sorted(seen) == sorted(fake.prompts)
    assert sorted(map(len, seen))[-2:] == [10, 30], "what the answer leaves"


def test_what_is_cut_is_told_from_what_fits(model: MoeModel) -> None:
    lm = transformers_model(model, tokenizer(False), 1, LIMIT)
    for length, cut in ((LIMIT - 3, False), (LIMIT - 2, True)):
        assert is_cut(lm, ("x" * length, "yz")) is cut
    for length, cut in ((LIMIT - 10, False), (LIMIT - 9, True)):
        assert is_cut(lm, ("x" * length, {"max_gen_toks": 10})) is cut
    assert transformers_model(model, tokenizer(False), 1).limit == model.model.config.max_position_embeddings


class Asked(Fitted):
    """Where a class of the harness would be, after ours has cut."""

    def __init__(self) -> None:
        self.limit = LIMIT


@pytest.mark.parametrize("answer", [LIMIT - 1, LIMIT, 3000])
def test_an_answer_that_does_not_fit_is_refused(answer: int) -> None:
    lm = Asked()
    with pytest.raises(EvaluationError, match=rf"{answer + 1} tokens does not fit into {LIMIT}"):
        lm._loglikelihood_tokens([(None, [1], [2] * answer)])
    request = Instance("generate_until", {}, ("hi", {"max_gen_toks": answer + 1}), 0)
    with pytest.raises(EvaluationError, match=rf"{answer + 1} tokens does not fit into {LIMIT}"):
        lm.generate_until([request])


def test_lengths_are_asked_for_and_never_guessed() -> None:
    assert resolve_limit(2048, None, "it") == 2048
    assert resolve_limit(2048, 256, "it") == resolve_limit(None, 256, "it") == 256
    with pytest.raises(EvaluationError, match="--max-model-len 4096: it takes 2048"):
        resolve_limit(2048, 4096, "it")
    with pytest.raises(EvaluationError, match="does not say how many tokens it takes"):
        resolve_limit(None, None, "it")
    assert [new_tokens(g) for g in ({}, {"max_tokens": 5}, {"max_gen_toks": 7, "max_tokens": 5})] == [
        256,
        5,
        7,
    ]


def row(condition: str, length: int | None, cut: list[str]) -> Run:
    column = Column(
        metric="acc", items={"score": {"t/0": 1.0}}, tokens=1, seconds=1.0, max_model_len=length, cut=cut
    )
    return Run(
        condition=condition, description="", key="", model="m", backend="vllm", settings={}, versions={},
        benchmarks={"t": column},
    )  # fmt: skip


def test_rows_that_were_cut_at_other_lengths_are_not_compared() -> None:
    check_same_prompts([row("standard", 100, []), row("full", 200, [])])
    check_same_prompts([row("standard", 100, ["t/0"]), row("full", 100, ["t/0"]), row("old", None, [])])
    with pytest.raises(EvaluationError, match=r"standard 100, full 200 tokens.*--max-model-len 100"):
        check_same_prompts([row("standard", 100, ["t/0"]), row("full", 200, [])])
