"""Which files of a folder count, and which of their tensors are routers."""

import json
import os
from pathlib import Path

import pytest
import torch

from cor_vllm.checkpoint import FingerprintError, weight_names
from cor_vllm.fingerprint import read_routers
from cor_vllm.testing import tiny_models
from tests.model_copies import Weights, copy, index, other_routers, routers, save, shard, weights_of


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("deepseek_v3", tmp_path_factory.mktemp("models") / "original")


def test_a_stray_file_changes_nothing(original: Path, tmp_path: Path) -> None:
    wrong = other_routers(weights_of(original))
    for name in ("aaa.safetensors", "zz.safetensors", "consolidated.safetensors", "model.fp16.safetensors"):
        with_index, without = tmp_path / f"{name}-with", tmp_path / f"{name}-without"
        for folder in (shard(copy(original, with_index)), copy(original, without)):
            save(wrong, folder / name)
            assert read_routers(folder) == read_routers(original), name


def test_other_routers_in_an_indexed_file(original: Path, tmp_path: Path) -> None:
    folder = shard(copy(original, tmp_path / "copy", other_routers))
    save(weights_of(original), folder / "zz.safetensors")
    assert read_routers(folder) != read_routers(original)


def test_a_single_file_next_to_an_index(original: Path, tmp_path: Path) -> None:
    """transformers loads the single file, vLLM those of the index: the same routers, or nothing."""
    folder = shard(copy(original, tmp_path / "copy"))
    save(weights_of(original), folder / "model.safetensors")
    assert read_routers(folder) == read_routers(original)
    save(other_routers(weights_of(original)), folder / "model.safetensors")
    with pytest.raises(
        FingerprintError, match=r"which transformers loads, has other routers than the files of"
    ):
        read_routers(folder)
    index(folder, dict.fromkeys(weights_of(original), "model.safetensors"))
    assert read_routers(folder) != read_routers(original)


def test_a_file_that_the_index_names_and_is_missing(original: Path, tmp_path: Path) -> None:
    folder = shard(copy(original, tmp_path / "copy"), 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        FingerprintError, match=r"model-00002-of-00003\.safetensors is missing, though .*index"
    ):
        read_routers(folder)


def test_shards_without_an_index(original: Path, tmp_path: Path) -> None:
    folder = shard(copy(original, tmp_path / "copy"))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        FingerprintError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        read_routers(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "a\0b",
        3,
        None,
        [],
    ],
)
def test_an_index_that_names_no_file_of_the_folder(original: Path, tmp_path: Path, name: object) -> None:
    """Nothing outside of the folder is opened, and nothing below it, which vLLM does not load either."""
    (tmp_path / "copy" / "sub").mkdir(parents=True)
    folder = copy(original, tmp_path / "copy" / "model")
    (folder / "sub").mkdir()
    for outside in (folder.parent / "secret.safetensors", folder / "sub" / "model.safetensors"):
        save(weights_of(original), outside)
    (folder / "model.safetensors").unlink()
    index(folder, {"model.layers.1.mlp.gate.weight": name})
    with pytest.raises(FingerprintError, match=r"index\.json: (names|has no weight_map)") as caught:
        read_routers(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 3}', "[" * 9999])
def test_a_broken_index(original: Path, tmp_path: Path, text: str) -> None:
    folder = shard(copy(original, tmp_path / "copy"))
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FingerprintError, match=r"index\.json: has no weight_map .*download the model again"):
        read_routers(folder)


def test_an_empty_index(original: Path, tmp_path: Path) -> None:
    folder = shard(copy(original, tmp_path / "copy"))
    index(folder, {})
    with pytest.raises(
        FingerprintError, match=r"index\.json: has no weight_map that could be used .*it is empty"
    ):
        read_routers(folder)


def test_the_index_says_which_files_and_the_files_say_what_is_in_them(original: Path, tmp_path: Path) -> None:
    """Loaders read all tensors of the files that are named, whether or not the index lists them."""
    folder = shard(copy(original, tmp_path / "copy"))
    file = folder / "model.safetensors.index.json"
    weight_map = json.loads(file.read_text())["weight_map"]
    index(folder, {name: part for name, part in weight_map.items() if ".gate." not in name})
    assert read_routers(folder) == read_routers(original)


def test_links_of_a_download_are_followed(original: Path, tmp_path: Path) -> None:
    """Files of a hub snapshot are links to blobs elsewhere."""
    folder = shard(copy(original, tmp_path / "copy"))
    (tmp_path / "blobs").mkdir()
    for file in folder.glob("*.safetensors"):
        os.replace(file, tmp_path / "blobs" / file.stem)
        file.symlink_to(f"../blobs/{file.stem}")
    assert read_routers(folder) == read_routers(original)


def test_what_a_folder_needs(original: Path, tmp_path: Path) -> None:
    """Nothing is downloaded that is not loaded."""
    folder = shard(copy(original, tmp_path / "copy"))
    save(weights_of(original), folder / "consolidated.safetensors")
    assert weight_names(folder) == [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    assert weight_names(original) == ["model.safetensors"]


@pytest.mark.parametrize(
    "other", ["mtp.layers.1", "model.mtp.layers.1", "visual.layers.1", "talker.model.layers.1"]
)
def test_other_layers_do_not_count(original: Path, tmp_path: Path, other: str) -> None:
    """Heads for further tokens (`mtp.layers.0`), towers: the same names at the end, other meaning."""

    def add(weights: Weights) -> None:
        name = routers(weights)[0]
        weights[name.replace("model.layers.1", other)] = torch.randn(weights[name].shape)

    assert read_routers(copy(original, tmp_path / "copy", add)) == read_routers(original)


@pytest.mark.parametrize("prefix", ["layers", "language_model.model.layers", "model.language_model.layers"])
def test_names_of_the_same_layers(original: Path, tmp_path: Path, prefix: str) -> None:
    def rename(weights: Weights) -> Weights:
        return {name.replace("model.layers", prefix): values for name, values in weights.items()}

    renamed = read_routers(copy(original, tmp_path / "copy", rename))
    assert renamed == read_routers(original)
    assert renamed.info == read_routers(original).info  # the norms are found, too


def test_two_names_of_one_router(original: Path, tmp_path: Path) -> None:
    def twice(weights: Weights) -> None:
        weights["layers.1.mlp.gate.weight"] = weights["model.layers.1.mlp.gate.weight"].clone()

    both = copy(original, tmp_path / "copy", twice)
    assert read_routers(both) == read_routers(original)
    weights = weights_of(both)
    weights["layers.1.mlp.gate.weight"][0, 0] += 1
    save(weights, both / "model.safetensors")
    with pytest.raises(
        FingerprintError, match=r"model\.layers\.1\.mlp\.gate\.weight .* both name one router"
    ):
        read_routers(both)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("qweight", "qzeros", "scales", "g_idx"), r"g_idx, qweight, qzeros, scales"),  # AWQ, GPTQ
        (("weight_packed", "weight_scale", "weight_shape"), "weight_packed, weight_scale, weight_shape"),
        (("weight.absmax",), r"weight\.absmax"),
    ],
)
def test_a_quantised_router_is_named(
    original: Path, tmp_path: Path, names: tuple[str, ...], says: str
) -> None:
    def quantise(weights: Weights) -> None:
        for name in ("model.layers.2.mlp.gate.weight",):
            del weights[name]
            for other in names:
                weights[name.replace("weight", other)] = torch.ones(4, dtype=torch.int32)

    folder = copy(original, tmp_path / "copy", quantise)
    with pytest.raises(FingerprintError, match=rf"routers are quantised \(decoder layers \[2\]: {says}\)"):
        read_routers(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_a_router_in_eight_bits_is_named(original: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def quantise(weights: Weights) -> None:
        for name in routers(weights):
            weights[name] = weights[name].to(dtype)
            weights[f"{name}_scale_inv"] = torch.ones(1)

    with pytest.raises(FingerprintError, match=r"layers \[1, 2\]: weight in [FIU]8\S*, weight_scale_inv\)"):
        read_routers(copy(original, tmp_path / "copy", quantise))


def test_scales_next_to_a_router_that_is_not_quantised(original: Path, tmp_path: Path) -> None:
    def add(weights: Weights) -> None:
        weights["model.layers.1.mlp.gate.input_scale"] = torch.ones(1)

    assert read_routers(copy(original, tmp_path / "copy", add)) == read_routers(original)


@pytest.mark.parametrize(
    "name", ["mlp.gate.weight", "mlp.gate.e_score_correction_bias", "post_attention_layernorm.weight"]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_values_that_are_not_finite_are_named(
    original: Path, tmp_path: Path, name: str, value: float
) -> None:
    """A cast to float16 pushes large values to infinity."""

    def overflow(weights: Weights) -> None:
        weights[f"model.layers.1.{name}"].flatten()[0] = value

    folder = copy(original, tmp_path / "copy", overflow)
    with pytest.raises(
        FingerprintError, match=rf"model\.safetensors: model\.layers\.1\.{name} .*not finite"
    ) as caught:
        read_routers(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "{}",
        '{"num_hidden_layers": "3"}',
        '{"num_hidden_layers": null}',
        '{"text_config": "x"}',
        '"',
        "\ufeff{",
    ],
)
def test_a_configuration_that_says_no_number_of_layers(original: Path, tmp_path: Path, config: str) -> None:
    folder = copy(original, tmp_path / "copy")
    (folder / "config.json").write_text(config)
    with pytest.raises(FingerprintError, match=r"config\.json: says no num_hidden_layers") as caught:
        read_routers(folder)
    assert "\n" not in str(caught.value)
