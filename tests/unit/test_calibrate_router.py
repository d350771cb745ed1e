"""`calibrate --cor-router`: the model is measured with the trained router of one layer."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cor_vllm import overlay, scores
from cor_vllm.calibrate.config import CalibrationError, CalibrationOptions
from cor_vllm.calibrate.pipeline import calibrate
from cor_vllm.calibrate.reroute.options import RerouteOptions
from cor_vllm.calibrate.reroute.pipeline import reroute
from cor_vllm.commands.console import Terminal
from cor_vllm.overlay import RouterOverlay
from cor_vllm.scores import Scores
from cor_vllm.testing import tiny_models
from tests import model_copies

GATE = "model.layers.2.mlp.gate.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and a router file whose weight is another one."""
    folder = tmp_path_factory.mktemp("router")
    tiny_models.build("qwen3_moe", folder / "model")
    generator = torch.Generator().manual_seed(0)
    (folder / "ids.json").write_text(json.dumps(torch.randint(256, (30, 12), generator=generator).tolist()))
    written = reroute(
        RerouteOptions(
            model=str(folder / "model"), token_ids=folder / "ids.json", output=folder / "none.safetensors",
            objective="ce", served_dtype="float32",
        ),
        Terminal(quiet=True),
    )  # fmt: skip
    weight = torch.randn(written.router_weight.shape, generator=generator)
    config = written.config.model_copy(update={"drift": 1.0})
    overlay.save(folder / "r.safetensors", dataclasses.replace(written, router_weight=weight, config=config))
    return folder


def run(folder: Path, output: Path, **more: object) -> Scores:
    options = CalibrationOptions(
        model=str(folder / "model"), token_ids=folder / "ids.json", output=output, **more
    )
    return calibrate(options, Terminal(quiet=True))


def trained(folder: Path) -> RouterOverlay:
    return overlay.load(folder / "r.safetensors")


def test_the_scores_are_those_of_a_model_with_that_router(folder, tmp_path):
    found = run(folder, tmp_path / "a.safetensors", cor_router=folder / "r.safetensors")

    def put(weights):
        assert GATE in weights
        weights[GATE] = trained(folder).weight

    model_copies.copy(folder / "model", tmp_path / "model", put)
    (tmp_path / "ids.json").write_bytes((folder / "ids.json").read_bytes())
    expected = run(tmp_path, tmp_path / "b.safetensors")
    for name, values in expected.tensors().items():
        assert torch.equal(found.tensors()[name], values), name
    own = run(folder, tmp_path / "c.safetensors")
    assert not torch.equal(own.cei_raw, found.cei_raw)


def test_the_file_says_which_router_it_belongs_to(folder, tmp_path):
    run(folder, tmp_path / "a.safetensors", cor_router=folder / "r.safetensors")
    config = scores.load(tmp_path / "a.safetensors").config
    model = config.model
    assert config.calibration.cor_router == "r.safetensors"
    own = run(folder, tmp_path / "c.safetensors").config.model
    assert model.router_overlay == trained(folder).fingerprint
    assert model.fingerprint == own.fingerprint, "the checkpoint is the same"
    assert b"router_overlay" not in (tmp_path / "c.safetensors").read_bytes()


def test_a_router_of_another_model_is_refused(folder, tmp_path):
    def other(weights):
        weights[GATE] = weights[GATE].flip(0)

    model_copies.copy(folder / "model", tmp_path / "model", other)
    (tmp_path / "ids.json").write_bytes((folder / "ids.json").read_bytes())
    with pytest.raises(CalibrationError, match="the router file has"):
        run(tmp_path, tmp_path / "a.safetensors", cor_router=folder / "r.safetensors")


def test_the_checkpoint_itself_stays_as_it_was(folder, tmp_path):
    before = load_file(folder / "model" / "model.safetensors")[GATE]
    run(folder, tmp_path / "a.safetensors", cor_router=folder / "r.safetensors")
    assert torch.equal(load_file(folder / "model" / "model.safetensors")[GATE], before)
