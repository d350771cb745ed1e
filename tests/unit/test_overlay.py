"""The router file: a round trip, one clear line for everything that is wrong with a file, and the control."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_save

from cor_vllm.metadata import ScoresConfig
from cor_vllm.overlay import OverlayConfig, OverlayError, RouterOverlay, load, random_like, save
from tests.unit import fuzz
from tests.unit.test_scores import config as scores_config

N, HIDDEN = 6, 8
BIN = {"positions": 40, "documents": 4, "base": 2.0, "change": -0.02, "low": -0.03, "high": -0.01,
       "median": -0.001, "win_rate": 0.4}  # fmt: skip
EMPTY = {"positions": 0, "documents": 0} | dict.fromkeys(
    ("base", "change", "low", "high", "median", "win_rate")
)


def config(**changes) -> dict:
    values = {
        "model": {
            "name": "tiny", "revision": None, "architecture": "Qwen3MoeForCausalLM", "num_experts": N,
            "top_k": 2, "num_hidden_layers": 5, "fingerprint": "a" * 64,
        },
        "dtype": "bfloat16",
        "training": {
            "objective": "epo", "learning_rate": 3e-4, "kl": 0.0, "beta": 0.1, "tau": 0.1, "routes": 32,
            "pool": 6, "temperature": 1.0, "epochs": 1, "batch": 16, "steps": 7, "debias": False, "seed": 0,
            "corpus": "text", "corpus_sha256": "b" * 64, "positions": 100, "documents": 10,
        },
        "heldout": {"all": BIN, "confident": BIN, "ambiguous": EMPTY, "fragile": BIN},
        "diagnostics": {"preference": 0.16},
        "drift": 0.34,
        "versions": {"cor-vllm": "0.1.0"},
    }  # fmt: skip
    for path, value in changes.items():
        *sections, key = path.split("__")
        target = values
        for section in sections:
            target = target[section]
        target[key] = value
    return values


def example(**changes) -> RouterOverlay:
    generator = torch.Generator().manual_seed(0)
    values = {
        "layer_index": torch.tensor([4], dtype=torch.int32),
        "router_weight": torch.randn(1, N, HIDDEN, generator=generator).bfloat16().float(),
        "config": OverlayConfig.model_validate(config()),
    }
    return RouterOverlay(**{**values, **changes})


def raw_bytes(
    tensors: dict[str, torch.Tensor] | None = None, metadata: dict[str, str] | None = None
) -> bytes:
    """A file built without our writer, so that it may be wrong in any way."""
    metadata = metadata or {"format": "cor-router/1", "config": json.dumps(config())}
    return safetensors_save(example().tensors() if tensors is None else tensors, metadata)


def with_config(values: dict) -> bytes:
    return raw_bytes(metadata={"format": "cor-router/1", "config": json.dumps(values)})


def test_round_trip(tmp_path):
    path = tmp_path / "router.safetensors"
    save(path, example())
    back = load(path)
    assert back.config == example().config
    assert torch.equal(back.router_weight, example().router_weight)
    assert (back.layer, back.weight.shape) == (4, (N, HIDDEN))
    again = tmp_path / "again.safetensors"
    save(again, back)
    assert again.read_bytes() == path.read_bytes()


def test_what_a_later_minor_version_adds_is_kept(tmp_path):
    path = tmp_path / "router.safetensors"
    path.write_bytes(
        safetensors_save(
            {**example().tensors(), "later": torch.zeros(3)},
            {"format": "cor-router/1", "config": json.dumps(config(training__later=3))},
        )
    )
    save(path, load(path))
    assert load(path).config.training.later == 3


def tensors(**changes) -> dict[str, torch.Tensor]:
    return {**example().tensors(), **changes}


def weight_with(value: float) -> torch.Tensor:
    weight = example().router_weight.clone()
    weight[0, 0, 1] = value
    return weight


BAD_TENSORS = {
    "missing": ({"layer_index": example().layer_index}, "router_weight: missing"),
    "wrong dtype": (
        tensors(layer_index=torch.tensor([4])),
        "layer_index: dtype torch.int64, must be torch.int32",
    ),
    "half precision": (
        tensors(router_weight=example().router_weight.bfloat16()),
        "router_weight: dtype torch.bfloat16",
    ),
    "two layers": (tensors(layer_index=torch.tensor([3, 4], dtype=torch.int32)), "layer_index: shape [2]"),
    "flat": (tensors(router_weight=torch.zeros(N, HIDDEN)), "router_weight: shape [6, 8], must be [1, 6, "),
    "other experts": (tensors(router_weight=torch.zeros(1, N + 1, HIDDEN)), "router_weight: shape [1, 7, 8]"),
    "no hidden size": (tensors(router_weight=torch.zeros(1, N, 0)), "router_weight: shape [1, 6, 0]"),
    "NaN": (tensors(router_weight=weight_with(torch.nan)), "router_weight: nan at [0, 0, 1], must be finite"),
    "infinity": (tensors(router_weight=weight_with(torch.inf)), "router_weight: inf at [0, 0, 1]"),
    "not rounded": (
        tensors(router_weight=weight_with(1 + 2**-20)),
        "at [0, 0, 1], must be a value of bfloat16",
    ),
    "negative layer": (tensors(layer_index=torch.tensor([-1], dtype=torch.int32)), "layer_index: -1 at [0]"),
    "layer too high": (
        tensors(layer_index=torch.tensor([5], dtype=torch.int32)),
        "layer_index: 5 at [0], must be in [0, 5)",
    ),
}


def assert_refused(path, says: str) -> None:
    with pytest.raises(OverlayError) as caught:
        load(path)
    line = str(caught.value)
    assert says in line
    assert str(path) in line
    assert "\n" not in line
    assert len(line) < 600
    assert ";" in line  # cause; remedy


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_field_and_value(tmp_path, case):
    bad, says = BAD_TENSORS[case]
    path = tmp_path / "router.safetensors"
    path.write_bytes(raw_bytes(bad))
    assert_refused(path, says)


BAD_METADATA = {
    "no metadata": ({"unrelated": "x"}, "format: None"),
    "later major version": ({"format": "cor-router/2", "config": "{}"}, "update cor-vllm"),
    "a scores file": ({"format": "cor-scores/1", "config": "{}"}, "format: 'cor-scores/1'"),
    "config is not JSON": ({"format": "cor-router/1", "config": "{not json"}, "config: Invalid JSON"),
    "deeply nested": ({"format": "cor-router/1", "config": "[" * 100_000}, "config: "),
}
BAD_CONFIG = {
    "model__fingerprint": ("../../etc/passwd", "config.model.fingerprint"),
    "model__top_k": (7, "config.model.top_k: 7, must be at most 6"),
    "model__router_overlay": ("c" * 64, "config.model.router_overlay"),
    "dtype": ("float8", "config.dtype"),
    "training__objective": ("magic", "config.training.objective"),
    "training__kl": (-1, "config.training.kl"),
    "training__steps": (-1, "config.training.steps"),
    "training__corpus_sha256": ("b", "config.training.corpus_sha256"),
    "heldout__all": ({}, "config.heldout.all.positions"),
    "heldout__fragile__change": (float("nan"), "config.heldout.fragile.change"),
    "drift": (10.5, "config.drift: 10.5, must be at most 10"),
    "diagnostics__preference": ("much", "config.diagnostics.preference"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata_is_refused(tmp_path, case):
    metadata, says = BAD_METADATA[case]
    path = tmp_path / "router.safetensors"
    path.write_bytes(raw_bytes(metadata=metadata))
    assert_refused(path, says)


@pytest.mark.parametrize("field", BAD_CONFIG)
def test_bad_config_is_refused_by_field(tmp_path, field):
    value, says = BAD_CONFIG[field]
    values = json.loads(json.dumps(config()))  # bins share one dictionary
    *sections, key = field.split("__")
    target = values
    for section in sections:
        target = target[section]
    target[key] = value
    path = tmp_path / "router.safetensors"
    path.write_bytes(with_config(values))
    assert_refused(path, says)


@pytest.mark.parametrize("key", config())
def test_every_key_but_those_with_a_default_is_needed(tmp_path, key):
    values = config()
    del values[key]
    path = tmp_path / "router.safetensors"
    path.write_bytes(with_config(values))
    assert_refused(path, f"config.{key}: Field required")


def test_a_layer_without_a_router_is_refused(tmp_path):
    router = {"tensors": {"weight": {"dtype": "float32", "sha256": ["d" * 64]}}, "sketch": [0.0] * 64}
    path = tmp_path / "router.safetensors"
    path.write_bytes(with_config(config(model__routers=[{**router, "layer": 3}])))
    assert_refused(path, "layer_index: 4 at [0], must be a layer that has a router")
    path.write_bytes(with_config(config(model__routers=[{**router, "layer": n} for n in (3, 4)])))
    assert load(path).layer == 4


def test_paths_that_are_no_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path, "give the path of a router file")
    assert_refused(tmp_path / "pipe", "not a regular file")
    assert_refused(tmp_path / "absent", "No such file")


def test_save_refuses_what_load_would_refuse_and_leaves_nothing(tmp_path):
    with pytest.raises(OverlayError, match="router_weight: nan"):
        save(tmp_path / "f", example(router_weight=weight_with(torch.nan)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_refused_or_read_back(tmp_path, seed):
    router = fuzz.Format(load, OverlayError, config, with_config, ("model", "versions"))
    fuzz.check(router, tmp_path / "router.safetensors", seed)


def harm(**changes) -> str | None:
    return OverlayConfig.model_validate(config(**changes)).harm()


def test_harm_is_said_unless_the_held_out_loss_falls():
    assert harm() is None
    line = harm(heldout__all={**BIN, "change": 0.0096, "low": 0.004, "high": 0.0152})
    assert line == (
        "held-out check: this router does not lower the loss (change +0.0096, 95 % interval "
        "[+0.0040, +0.0152] nats); serve without --cor-router"
    )
    assert "does not lower" in harm(heldout__all={**BIN, "high": 0.0})
    assert "no held-out check" in harm(heldout={})
    assert "no held-out check" in harm(heldout__all=EMPTY)
    assert "the model's own" in harm(training__objective="none")


def test_the_fingerprint_is_of_the_layer_and_the_values_alone():
    same = example(config=OverlayConfig.model_validate(config(drift=0.1, dtype="float32")))
    assert same.fingerprint == example().fingerprint
    assert example(layer_index=torch.tensor([3], dtype=torch.int32)).fingerprint != example().fingerprint
    assert example(router_weight=weight_with(1.0)).fingerprint != example().fingerprint
    assert example(router_weight=example().weight.reshape(1, HIDDEN, N)).fingerprint != example().fingerprint


def test_the_control_is_as_far_from_the_base_in_another_direction():
    base = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    trained = (base.float() * 1.5).bfloat16().float()
    overlay = dataclasses.replace(example(), router_weight=trained[None])
    control = random_like(overlay, base, seed=3)
    moved, wanted = control.weight - base.float(), trained - base.float()
    assert float(moved.norm()) == pytest.approx(float(wanted.norm()), rel=1e-2)
    assert control.config.drift == pytest.approx(0.5, rel=1e-2)
    assert abs(float((moved * wanted).sum() / (moved.norm() * wanted.norm()))) < 0.1
    assert torch.equal(control.weight.bfloat16().float(), control.weight)
    np.testing.assert_array_equal(control.weight, random_like(overlay, base, seed=3).weight)
    assert not torch.equal(control.weight, random_like(overlay, base, seed=4).weight)
    assert "no held-out check" in control.config.harm()


def test_a_scores_file_says_under_which_overlay_it_was_measured_only_if_there_was_one():
    values = scores_config()
    assert "router_overlay" not in ScoresConfig.model_validate(values).model_dump()["model"]
    values["model"]["router_overlay"] = example().fingerprint
    written = ScoresConfig.model_validate(values).model_dump()["model"]
    assert written["router_overlay"] == example().fingerprint
