"""What is compared with the scores file is what the engine loads: its loader's files, then its memory."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cor_vllm import scores
from cor_vllm.fingerprint import FingerprintError
from cor_vllm.serve import fit
from cor_vllm.serve.fit import MisfitError
from cor_vllm.testing import tiny_models
from cor_vllm.testing.make_scores import make
from tests.model_copies import (
    Weights,
    cast,
    copy,
    folded,
    index,
    other_routers,
    routers,
    save,
    shard,
    weights_of,
)
from tests.parity.engine import generate
from tests.parity.test_refusals import caplog_vllm, configured, write  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return copy(tiny_models.build("qwen3_moe", root / "float32"), root / "qwen", cast(torch.bfloat16))


def first_version(folder: Path, tmp_path: Path) -> dict[str, str]:
    """A scores file as it was before routers were described: the hash of their bytes alone."""
    return write(folder, tmp_path, {"routers": None})


FILES = pytest.mark.parametrize("written", [write, first_version], ids=["file", "file of the first version"])


@FILES
@pytest.mark.parametrize("load_format", ["auto", "hf", "safetensors", "fastsafetensors"])
def test_an_extra_file_outside_the_index(qwen, tmp_path, written, load_format):
    folder = shard(copy(qwen, tmp_path / "copy"))
    save(other_routers(weights_of(qwen)), folder / "zz.safetensors")
    configured(folder, written(qwen, tmp_path), load_format=load_format)


@FILES
def test_other_routers_in_an_indexed_file(qwen, tmp_path, written):
    folder = shard(copy(qwen, tmp_path / "copy", other_routers))
    save(weights_of(qwen), folder / "zz.safetensors")  # what a reader of all files would have ended with
    with pytest.raises(MisfitError, match="fingerprint: the scores file has"):
        configured(folder, written(qwen, tmp_path))


@FILES
def test_other_routers_in_a_consolidated_file(qwen, tmp_path, written):
    """vLLM's load format auto then reads this file alone, and so does mistral; hf does not."""
    folder = copy(qwen, tmp_path / "copy")
    save(other_routers(weights_of(qwen)), folder / "consolidated.safetensors")
    file = written(qwen, tmp_path)
    for load_format in ("auto", "mistral"):
        with pytest.raises(MisfitError, match="fingerprint: the scores file has"):
            configured(folder, file, load_format=load_format)
    index(folder, dict.fromkeys(weights_of(qwen), "model.safetensors"))
    configured(folder, file, load_format="hf")


def test_a_consolidated_file_alone(qwen, tmp_path):
    folder = copy(qwen, tmp_path / "copy")
    os.rename(folder / "model.safetensors", folder / "consolidated.safetensors")
    configured(folder, write(qwen, tmp_path))


def test_without_an_index_every_file_is_loaded_and_the_last_one_counts(qwen, tmp_path):
    folder = copy(qwen, tmp_path / "copy")
    save(other_routers(weights_of(qwen)), folder / "extra.safetensors")
    configured(folder, write(qwen, tmp_path))
    os.rename(folder / "extra.safetensors", folder / "zz.safetensors")
    with pytest.raises(MisfitError, match="fingerprint"):
        configured(folder, write(qwen, tmp_path))


def test_a_missing_file_is_named(qwen, tmp_path):
    folder = shard(copy(qwen, tmp_path / "copy"), 3)
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(MisfitError, match=r"model-00003-of-00003\.safetensors") as caught:
        configured(folder, write(qwen, tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"model.layers.0.mlp.gate.weight": "../qwen/model.safetensors"}, r"\.\./qwen/model\.safetensors"),
        (None, "TypeError|AttributeError"),
        ({}, "no weights"),
    ],
)
def test_a_broken_index(qwen, tmp_path, weight_map, says):
    folder = copy(qwen, tmp_path / "copy")
    index(folder, weight_map)
    with pytest.raises(MisfitError, match=says) as caught:
        configured(folder, write(qwen, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_torch_files(qwen, tmp_path):
    folder = copy(qwen, tmp_path / "copy")
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    configured(folder, write(qwen, tmp_path))  # vLLM prefers safetensors
    (folder / "model.safetensors").unlink()
    with pytest.raises(MisfitError, match=r"no \*\.safetensors file"):
        configured(folder, write(qwen, tmp_path))


@pytest.mark.parametrize(
    "change",
    [cast(torch.float16), cast(torch.float16, torch.bfloat16), cast(torch.float32), folded(1)],
    ids=["float16", "and back", "float32", "AWQ"],
)
def test_copies_are_accepted(qwen, tmp_path, caplog_vllm, change):  # noqa: F811
    caplog_vllm.set_level(logging.WARNING)
    configured(copy(qwen, tmp_path / "copy", change), write(qwen, tmp_path))
    assert ("decoder layers [1] were rescaled together with the norm" in caplog_vllm.text) == (
        change.__qualname__.startswith("folded")
    )


def test_a_file_of_the_first_version_cannot_tell_another_dtype(qwen, tmp_path):
    folder = copy(qwen, tmp_path / "copy", cast(torch.float16))
    with pytest.raises(MisfitError, match=r"fingerprint.*first version.*another dtype.*calibrated again"):
        configured(folder, first_version(qwen, tmp_path))


def test_a_norm_that_was_rescaled_without_its_router(qwen, tmp_path):
    folder = copy(qwen, tmp_path / "copy", folded(1, with_router=False))
    with pytest.raises(
        MisfitError, match=r"decoder layers \[1\] the norm before the router has other scales"
    ):
        configured(folder, write(qwen, tmp_path))


def test_a_quantised_router_is_named(qwen, tmp_path):
    def quantise(weights: Weights) -> None:
        for name in routers(weights):
            weights[name.replace("weight", "qweight")] = torch.ones(4, dtype=torch.int32)
            del weights[name]

    folder = copy(qwen, tmp_path / "copy", quantise)
    with pytest.raises(FingerprintError, match=r"quantised \(decoder layers \[0, 1, 2\]: qweight\)"):
        configured(folder, write(qwen, tmp_path))


def loads(model: str, download_dir: Path, revision: str | None = None) -> list[str]:
    from vllm.config import LoadConfig

    model_config = SimpleNamespace(model=model, revision=revision)
    engine = SimpleNamespace(
        load_config=LoadConfig(download_dir=str(download_dir)), model_config=model_config
    )
    return [file.name for file in fit.loader_files(engine)]


def test_a_model_of_the_hub_that_was_downloaded(qwen, tmp_path):
    """Offline, by the cache's revisions and links; with --download-dir and --revision."""
    repository = tmp_path / "models--org--name"
    for revision, parts in (("main", 2), ("older", 3)):
        snapshot = shard(copy(qwen, repository / "snapshots" / f"commit-of-{revision}"), parts)
        save(weights_of(qwen), snapshot / "zz.safetensors")
        (repository / "blobs").mkdir(exist_ok=True)
        for file in snapshot.iterdir():
            blob = repository / "blobs" / f"{revision}-{file.name}"
            os.rename(file, blob)
            file.symlink_to(os.path.relpath(blob, snapshot))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(f"commit-of-{revision}")
    assert loads("org/name", tmp_path) == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert loads("org/name", tmp_path, "older") == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    with pytest.raises(MisfitError, match="org/name: vLLM finds no weights") as caught:
        loads("org/name", tmp_path, "never")
    assert "\n" not in str(caught.value)


def test_a_model_of_modelscope(qwen, tmp_path, monkeypatch):
    """vLLM's loader asks ModelScope's client, which is played by the test; Hugging Face's is not asked."""
    folder = shard(copy(qwen, tmp_path / "copy"))
    asked = []

    def snapshot_download(model_id: str, **options: Any) -> str:
        asked.append(model_id)
        return str(folder)

    class HubApi:
        login = get_model_files = lambda self, *args, **kwargs: []

    for name in ("modelscope", "modelscope.hub", "modelscope.hub.api", "modelscope.hub.snapshot_download"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["modelscope.hub.snapshot_download"].snapshot_download = snapshot_download  # type: ignore[attr-defined]
    sys.modules["modelscope.hub.api"].HubApi = HubApi  # type: ignore[attr-defined]
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    assert loads("org/name", tmp_path) == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert asked == ["org/name"]


# ---- the memory of a worker


@pytest.fixture
def after_load(monkeypatch) -> Callable[[Callable[[Any], None]], None]:
    """Have the engine's loader do something more."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load_weights = DefaultModelLoader.load_weights

    def install(change: Callable[[Any], None]) -> None:
        def load_and_change(self: Any, model: Any, model_config: Any) -> None:
            load_weights(self, model, model_config)
            change(model)

        monkeypatch.setattr(DefaultModelLoader, "load_weights", load_and_change)

    return install


@FILES
def test_an_engine_that_has_loaded_other_routers(qwen, tmp_path, after_load, written):
    """In one value of one layer, in the dtype of the engine, which is another one than the file's."""

    def change(model: Any) -> None:
        model.model.layers[1].mlp.gate.weight.data[2, 5] *= 1.02

    after_load(change)
    with pytest.raises(MisfitError, match=r"the engine has loaded other routers in decoder layers \[1\]"):
        generate(qwen, written(qwen, tmp_path), 1, dtype="float16")


def test_files_that_change_between_the_check_and_the_load(qwen, tmp_path, monkeypatch):
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    folder = copy(qwen, tmp_path / "copy")
    create_model = BaseModelLoader.create_model

    def swap(self: Any, *args: Any, **kwargs: Any) -> Any:
        save(other_routers(weights_of(qwen)), folder / "model.safetensors")
        return create_model(self, *args, **kwargs)

    monkeypatch.setattr(BaseModelLoader, "create_model", swap)
    with pytest.raises(MisfitError, match=r"fingerprint.*routers of decoder layers \[0, 1, 2\] have other"):
        generate(folder, write(qwen, tmp_path), 1)


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe"])
def test_a_bias_that_was_not_loaded(checkpoints, tmp_path, after_load, family):
    """The whole of a router counts, its biases, too."""
    name = {"gpt_oss": "bias", "glm4_moe": "e_score_correction_bias"}[family]

    def change(model: Any) -> None:
        mlp = model.model.layers[2].mlp
        getattr(getattr(mlp, "gate", None) or mlp.router, name).data.zero_()

    after_load(change)
    path = tmp_path / "scores.safetensors"
    scores.save(path, make(checkpoints[family]))
    with pytest.raises(MisfitError, match=r"other routers in decoder layers \[2\]"):
        generate(checkpoints[family], {"scores": str(path)}, 1)


class Quantised:
    """A linear layer's method that keeps eight bits of each weight, and multiplies by what is left."""

    def __init__(self, gate: Any, worth: float) -> None:
        self.left = (gate.weight.data.float() * worth).to(torch.float8_e4m3fn)

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight.data = torch.empty(0)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x @ self.left.to(x.dtype).T


@pytest.mark.parametrize("worth", [1.0, 2.0], ids=["its own", "another"])
def test_routers_that_the_engine_quantises(qwen, tmp_path, after_load, caplog_vllm, worth):  # noqa: F811
    def quantise(model: Any) -> None:
        gate = model.model.layers[1].mlp.gate
        gate.quant_method, gate.is_unquantized = Quantised(gate, worth), False

    after_load(quantise)
    file = write(qwen, tmp_path)
    if worth == 1:
        generate(qwen, file, 1)
        assert "the engine has quantised the routers of decoder layers [1]" in caplog_vllm.text
    else:
        with pytest.raises(MisfitError, match=r"other routers in decoder layers \[1\]"):
            generate(qwen, file, 1)
