"""The conditions of the evaluation: what each is, does and controls, and how they are chosen."""

import re
from fnmatch import fnmatchcase

import pytest
import torch

from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.evaluate.conditions import (
    DEFINED_BY_A_FILE,
    Permuted,
    RandomBias,
    Sources,
    modes,
    on_transformers,
    select,
    table,
)
from cor_vllm.scores import Scores
from cor_vllm.serve.config import CorConfig, plan


def test_every_condition_is_something_that_the_server_takes(scores: Scores) -> None:
    rows = table(Sources({"": scores, "facts": scores}), 0.1)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        if row.options is not None:
            changed = row.change(scores) if row.change else scores
            layers = plan(CorConfig.of({"scores": "-", **row.options}), changed)
            assert len(layers) == 3, row.name


def test_conditions_are_what_they_are_called(scores: Scores) -> None:
    rows = {row.name: row for row in table(Sources({"": scores, "facts": scores}), 0.1)}
    for name, row in rows.items():
        assert row.source == name.partition("@")[2]
        options = row.options or {}
        if name.startswith("static-"):
            assert options == {"static_k": int(name.removeprefix("static-"))}
        if "-swap0." in name:
            assert options["swap_rate"] == float(name.split("-")[1].removeprefix("swap"))
    noise = RandomBias(0)
    assert noise.scale(scores) > 1, "or this proves nothing"
    assert (rows["random-bias"].options or {})["lambda"] == pytest.approx(0.1 * noise.scale(scores))


def test_no_server_is_called_like_a_row_that_needs_a_scores_file(scores: Scores) -> None:
    known = {row.name for row in [*modes({}), *on_transformers({})]}
    for row in table(Sources({"": scores, "facts": scores}), 0.1):
        assert row.name in known or any(fnmatchcase(row.name, each) for each in DEFINED_BY_A_FILE), row.name


def test_conditions_say_whose_control_and_whose_draw_they_are(scores: Scores) -> None:
    rows = table(Sources({"": scores, "facts": scores, "st0": scores, "st1": scores}), 0.1)
    names = {row.name for row in rows}
    for row in rows:
        assert (row.control_of is not None) == ("-permuted" in row.name), row.name
        if row.control_of:
            assert row.control_of in names and row.change is not None
            assert row.control_of == re.sub(r"-permuted(-\d+)?", "", row.name)
        draw = re.sub(r"(-permuted)-\d+|(@[a-z]+)\d+$", r"\1\2", row.name)
        assert row.draw_of == (draw if draw != row.name else None), row.name
        assert row.static == row.name.startswith("static-")
        assert row.transformers_only == (
            row.name in ("gate-router", "gate-output", "dola", "iti", "full-dola")
        )


def test_permuted_keeps_each_layers_values_and_nothing_else(scores: Scores) -> None:
    changed = Permuted(0)(scores)
    assert torch.equal(changed.cei.sort(dim=1).values, scores.cei.sort(dim=1).values)
    assert not torch.equal(changed.cei, scores.cei)
    assert not torch.equal(changed.cei, Permuted(1)(scores).cei)
    assert torch.equal(changed.k, scores.k)


def test_random_bias_has_the_norm_of_cei(scores: Scores) -> None:
    noise = RandomBias(0)
    changed = noise(scores).cei * noise.scale(scores)
    for ours, theirs in zip(changed, scores.cei, strict=True):
        norms = [(values - values.mean()).norm().item() for values in (ours, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert noise(scores).cei.min() >= 0
    assert noise(scores).cei.max() <= 1


def test_conditions_are_chosen_by_name_pattern_and_group(scores: Scores) -> None:
    rows = table(Sources({"": scores, "facts": scores}), 0.1)
    names = [row.name for row in select(rows, ["static-*"])]
    assert names == ["standard", "static-4", "static-5", "static-6", "static-7"]
    assert [row.name for row in select(rows, ["full"])] == ["standard", "full"]
    permuted = [f"expert-permuted-{seed}@facts" for seed in range(3)]
    assert [row.name for row in select(rows, ["expert-permuted-*@facts"])] == ["standard", *permuted]
    assert len(select(rows, ["all"])) == len(rows)
    assert "dola" in [row.name for row in select(rows, ["paper"])]
    with pytest.raises(EvaluationError, match="--conditions ful: unknown; known are all, quick"):
        select(rows, ["ful"])
