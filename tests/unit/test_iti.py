"""ITI: the heads and directions it finds, the shift itself, and that it leaves nothing behind."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.result.heldout import Tables, rules
from cor_vllm.evaluate.dola import dola
from cor_vllm.evaluate.iti import Directions, Example, activations, default_heads, fit, iti
from cor_vllm.testing import tiny_models

sklearn = pytest.importorskip("sklearn")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, tiny_models.VOCAB, (rows, length), generator=generator(0))


def texts(count: int) -> list[list[int]]:
    """Of different lengths; the label is the parity of their sum, which no linear probe reads."""
    ids = torch.randint(1, tiny_models.VOCAB, (count, 12), generator=generator(3)).tolist()
    return [row[: 4 + index % 9] for index, row in enumerate(ids)]


def examples(count: int) -> list[Example]:
    """Two texts a question."""
    return [(ids, sum(ids) % 2, f"question {index // 2}") for index, ids in enumerate(texts(count))]


def some_directions(model: Any, heads: list[tuple[int, int]]) -> Directions:
    size = model.model.layers[0].self_attn.o_proj.in_features // 2
    random = torch.randn(len(heads), size, generator=generator(1))
    scale = torch.rand(len(heads), generator=generator(2)) + 0.5
    return Directions(torch.tensor(heads), nn.functional.normalize(random, dim=1), scale, torch.zeros(3, 2))


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def projection_inputs(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """[B, S, H, D] of every layer, after all hooks that stand before this call."""
    found: list[torch.Tensor] = []
    with ExitStack() as stack:
        for layer in model.model.layers:
            hook = layer.self_attn.o_proj.register_forward_pre_hook(
                lambda m, args: found.append(args[0].clone())
            )
            stack.callback(hook.remove)
        model(ids)
    return [values.unflatten(-1, (2, -1)) for values in found]


@contextmanager
def planted(model: Any, layer: int, head: int, direction: torch.Tensor) -> Iterator[None]:
    """One head says ±`direction` at every position, by the text's parity; the padding's id 0 adds nothing."""
    parity = torch.empty(0)

    def read(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal parity
        parity = kwargs["input_ids"].sum(1) % 2

    def plant(module: nn.Module, args: Any) -> Any:
        heads = args[0].unflatten(-1, (2, -1)).clone()
        heads[:, :, head] += (2.0 * parity - 1)[:, None, None] * direction
        return (heads.flatten(-2),)

    first = model.model.register_forward_pre_hook(read, with_kwargs=True)
    second = model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(plant)
    yield
    first.remove()
    second.remove()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_activations_are_those_of_each_text_alone(family: str) -> None:
    model, some = tiny_models.create(family), texts(5)
    found = activations(model, some)
    for row, ids in enumerate(some):
        expected = [values[0, -1] for values in projection_inputs(model, torch.tensor([ids]))]
        torch.testing.assert_close(found[row], torch.stack(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_fit_finds_a_planted_direction(family: str) -> None:
    model, data = tiny_models.create(family), examples(60)
    direction = 3 * torch.randn(32, generator=generator(5))
    with planted(model, 1, 1, direction):
        found = fit(model, data)
        alone = [projection_inputs(model, torch.tensor([ids]))[1][0, -1, 1] for ids, _, _ in data]
    assert found.heads.tolist() == [[1, 1]], "the planted head is not the best"
    assert found.accuracy[1, 1] == 1 and found.accuracy.shape == (3, 2)
    assert (found.accuracy[0] < 0.9).all() and found.accuracy[1, 0] < 0.9, "a probe saw what it was tested on"
    true = torch.stack([x for x, (_, label, _) in zip(alone, data, strict=True) if label])
    false = torch.stack([x for x, (_, label, _) in zip(alone, data, strict=True) if not label])
    shift = (true.double().mean(0) - false.double().mean(0)).float()
    theta = shift / shift.norm()
    torch.testing.assert_close(found.directions[0], theta, atol=1e-4, rtol=1e-4)
    assert torch.dot(theta, direction / direction.norm()) > 0.98
    sigma = torch.stack([torch.dot(x, theta) for x in alone]).std(correction=0)
    torch.testing.assert_close(found.scale[0], sigma, atol=1e-4, rtol=1e-4)


def test_accuracy_is_that_of_the_held_out_questions() -> None:
    """Twins share their label by question; a probe that had seen one twin would know the other."""
    model = tiny_models.create("olmoe")
    ids = [row[:6] for row in texts(200) if len(row) >= 6][:24]
    data = [(row, index % 2, index) for index, row in enumerate(ids) for _ in range(4)]
    assert fit(model, data).accuracy.mean() < 0.75
    leaked = [(row, label, number) for number, (row, label, _) in enumerate(data)]
    assert fit(model, leaked).accuracy.mean() > 0.75


def test_heads_are_ranked_and_counted() -> None:
    model, data = tiny_models.create("olmoe"), examples(40)
    found = fit(model, data, 6)
    ranked = [found.accuracy[layer, head].item() for layer, head in found.heads.tolist()]
    assert ranked == sorted(ranked, reverse=True) and len({*map(tuple, found.heads.tolist())}) == 6
    for one, other in zip(found.heads.tolist(), found.heads.tolist()[1:], strict=False):
        same = found.accuracy[tuple(one)] == found.accuracy[tuple(other)]
        assert not same or one < other, "equals go by layer and head"
    assert torch.equal(fit(model, data, 2).heads, found.heads[:2])
    assert [default_heads(total) for total in (1024, 1536, 256, 6)] == [48, 48, 12, 1]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_alpha_0_is_bit_identical(family: str) -> None:
    model, ids = tiny_models.create(family), tokens(2, 8)
    with torch.no_grad():
        own = model(ids).logits
        with iti(model, some_directions(model, [(0, 1), (2, 0)]), alpha=0.0):
            assert torch.equal(model(ids).logits, own)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_chosen_heads_and_no_others_are_shifted(family: str) -> None:
    model, ids = tiny_models.create(family), tokens(2, 8)
    own = projection_inputs(model, ids)
    for heads in ([(1, 0)], [(1, 1)], [(1, 1), (1, 0)]):
        found = some_directions(model, heads)
        with iti(model, found, 4.0):
            shifted = projection_inputs(model, ids)
        assert torch.equal(shifted[0], own[0]), "a layer below"
        expected = own[1].clone()
        for (_, head), theta, sigma in zip(heads, found.directions, found.scale, strict=True):
            expected[:, :, head] += 4.0 * sigma * theta
        torch.testing.assert_close(shifted[1], expected, atol=1e-6, rtol=1e-6)
        untouched = {0, 1} - {head for _, head in heads}
        assert all(torch.equal(shifted[1][:, :, head], own[1][:, :, head]) for head in untouched)
        assert not torch.equal(shifted[2], own[2]), "a layer above sees it"


def test_rows_restrict_the_shift() -> None:
    model, ids = tiny_models.create("olmoe"), tokens(2, 8)
    rows = torch.zeros(2, 8, dtype=torch.bool)
    rows[1, 5:] = True
    found, own = some_directions(model, [(1, 0)]), projection_inputs(model, ids)[1]
    with iti(model, found, rows=rows):
        shifted = projection_inputs(model, ids)[1]
    assert torch.equal((shifted != own).any(-1).any(-1), rows)
    amount = 15 * found.scale[0] * found.directions[0]
    torch.testing.assert_close(shifted[1, 5:, 0] - own[1, 5:, 0], amount.expand(3, -1), atol=1e-5, rtol=1e-5)


def test_composes_with_routing_and_dola() -> None:
    """The shift before a projection is a bias after it: the same losses come from changed weights."""
    moe, ids = MoeModel(tiny_models.create("olmoe")), tokens(2, 8)
    cei = torch.rand(moe.num_layers, moe.num_experts, generator=generator(1))
    routed = rules(moe, Tables([2, 4, 3], cei), "full", 0.5, 0)
    found = some_directions(moe.model, [(1, 1)])
    with moe.routing(routed):
        only_routed = moe.losses(ids)
        with iti(moe.model, found, 3.0):
            both = moe.losses(ids)
    with iti(moe.model, found, 3.0), moe.routing(routed):
        assert torch.equal(moe.losses(ids), both), "the order of the contexts matters"
        with dola(moe.model, [0, 1]), torch.no_grad():
            contrasted = moe.model(ids).logits
    assert (both - only_routed).abs().max() > 1e-3
    projection = moe.model.model.layers[1].self_attn.o_proj
    amount = torch.cat([torch.zeros(32), 3.0 * found.scale[0] * found.directions[0]])
    projection.bias = nn.Parameter(projection.weight.detach() @ amount)
    with moe.routing(routed):
        torch.testing.assert_close(moe.losses(ids), both, atol=1e-4, rtol=1e-4)
        with dola(moe.model, [0, 1]), torch.no_grad():
            torch.testing.assert_close(moe.model(ids).logits, contrasted, atol=1e-3, rtol=1e-3)


def test_nothing_is_left_behind() -> None:
    model, ids = tiny_models.create("olmoe"), tokens(1, 6)
    before = hooks(model)
    with torch.no_grad():
        own = model(ids).logits
        with pytest.raises(KeyError), iti(model, some_directions(model, [(0, 0), (2, 1)])):
            assert not torch.equal(model(ids).logits, own)
            raise KeyError
        assert torch.equal(model(ids).logits, own) and hooks(model) == before
    fit(model, examples(30))
    with pytest.raises(IndexError):
        activations(model, [[1, 2], [tiny_models.VOCAB]])
    assert hooks(model) == before


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    model = tiny_models.create("olmoe")
    found = fit(model, examples(30), 3)
    found.save(tmp_path / "iti.safetensors")
    back = Directions.load(tmp_path / "iti.safetensors")
    for name in ("heads", "directions", "scale", "accuracy"):
        assert torch.equal(getattr(back, name), getattr(found, name))


def test_files_that_are_no_directions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "iti.safetensors"
    with pytest.raises(ValueError, match="cannot be read"):
        Directions.load(path)
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="cannot be read"):
        Directions.load(path)
    save_file({"heads": torch.zeros(1, 2)}, path)
    with pytest.raises(ValueError, match="format is None"):
        Directions.load(path)
    save_file({"heads": torch.zeros(1, 2)}, path, {"format": "cor-iti/1"})
    with pytest.raises(ValueError, match="cannot be read"):
        Directions.load(path)


def test_directions_that_do_not_fit_are_refused() -> None:
    model = tiny_models.create("olmoe")
    good = some_directions(model, [(0, 0)])
    for field, value in (
        ("heads", torch.zeros(2, 2, dtype=torch.int64)),
        ("heads", torch.zeros(1, 2)),
        ("heads", torch.tensor([[3, 0]])),
        ("heads", torch.tensor([[0, -1]])),
        ("directions", torch.zeros(32)),
        ("scale", torch.zeros(2)),
        ("accuracy", torch.zeros(3)),
    ):
        with pytest.raises(ValueError, match="fit the directions again"):
            Directions(**{**vars(good), field: value})
    other = tiny_models.create("olmoe", num_hidden_layers=2)
    with pytest.raises(ValueError, match="fit them on this model"), iti(other, good):
        pass


@pytest.mark.parametrize(
    ("data", "heads", "message"),
    [
        ([*examples(30), ([], 1, "empty")], None, "no token"),
        ([*examples(30), ([1], 2, "odd")], None, "other than 0 and 1"),
        ([(ids, 1, question) for ids, _, question in examples(30)], None, "lacks true or false"),
        (examples(2), None, "lacks true or false"),
        ([], None, "lacks true or false"),
        (examples(30), 0, "give 1 to 6"),
        (examples(30), 7, "give 1 to 6"),
    ],
)
def test_what_cannot_be_fitted_is_refused(data: list[Example], heads: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tiny_models.create("olmoe"), data, heads)


def test_without_scikit_learn_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        fit(tiny_models.create("olmoe"), examples(30))
