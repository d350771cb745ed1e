"""The scores file: a round trip, and one clear line for everything that is wrong with a file."""

import dataclasses
import json
import os
import struct

import pytest
import torch
from safetensors.torch import save as safetensors_save

from cor_vllm import scores as scores_file
from cor_vllm.metadata import ScoresConfig
from cor_vllm.scores import Scores, ScoresError, load, save

M, N = 3, 6


def config(**changes) -> dict:
    values = {
        "model": {
            "name": "tiny", "revision": None, "architecture": "Qwen3MoeForCausalLM", "num_experts": N,
            "top_k": 2, "num_hidden_layers": 5, "fingerprint": "a" * 64,
        },
        "calibration": {
            "corpus": "text", "corpus_sha256": "b" * 64, "seed": 0, "num_positions": 100, "num_hard": 10,
            "num_easy": 10, "tau_high": 4.5, "tau_low": 0.1, "delta": 0.1,
        },
        "budget": {"rule": "exact", "k_min": 1, "k_max": 4, "total": 6, "sum": 6},
        "heldout": {
            "positions": 50, "hard_positions": 5,
            "modes": {"stock": {"all": {"mean": 2.0, "difference": 0.0, "sem": 0.0},
                                "hard": {"mean": 5.0, "difference": 0.0, "sem": 0.0}}},
        },
        "serving": {"lambda": 0.05},
        "versions": {"cor-vllm": "0.1.0"},
    }  # fmt: skip
    for path, value in changes.items():
        *sections, key = path.split("__")
        target = values
        for section in sections:
            target = target[section]
        target[key] = value
    return values


def example(**tensors) -> Scores:
    generator = torch.Generator().manual_seed(0)
    values = {
        "layer_index": torch.tensor([1, 2, 4], dtype=torch.int32),
        "k": torch.tensor([1, 2, 3], dtype=torch.int32),
        "cei": torch.rand(M, N, generator=generator),
        "cei_raw": torch.randn(M, N, generator=generator),
        "cei_sem": torch.rand(M, N, generator=generator),
        "cei_count": torch.randint(0, 9, (M, N), generator=generator, dtype=torch.int32),
        "rki": torch.randn(M, generator=generator),
        "sensitivity_hard": torch.randn(M, generator=generator),
        "sensitivity_easy": torch.randn(M, generator=generator),
        "router_prob": torch.rand(M, N, generator=generator),
        "swap_rate": torch.rand(M, 5, generator=generator),
    }
    return Scores(**{**values, **tensors}, config=ScoresConfig.model_validate(config()))


def raw_bytes(
    tensors: dict[str, torch.Tensor] | None = None, metadata: dict[str, str] | None = None
) -> bytes:
    """A file built without our writer, so that it may be wrong in any way."""
    metadata = metadata or {"format": "cor-scores/1", "config": json.dumps(config())}
    return safetensors_save(tensors if tensors is not None else example().tensors(), metadata)


def assert_equal(a: Scores, b: Scores) -> None:
    assert a.config == b.config
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor, b.tensors()[name]), name


def test_round_trip(tmp_path):
    path = tmp_path / "scores.safetensors"
    save(path, example())
    back = load(path)
    assert_equal(back, example())
    assert (back.num_layers, back.num_experts) == (M, N)
    assert back.config.serving.lambda_ == 0.05
    assert back.config.calibration.delta == 0.1  # options ride along as extra keys
    again = tmp_path / "again.safetensors"
    save(again, back)
    assert again.read_bytes() == path.read_bytes()


def test_reads_files_of_other_writers(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(raw_bytes({**example().tensors(), "of_a_later_minor": torch.zeros(3)}))
    assert_equal(load(path), example())


def write(tmp_path, data: bytes):
    path = tmp_path / "scores.safetensors"
    path.write_bytes(data)
    return path


def tensors(**changes) -> dict[str, torch.Tensor]:
    return {**example().tensors(), **changes}


def changed(name: str, value: float) -> torch.Tensor:
    tensor = example().tensors()[name].clone()
    tensor.view(-1)[1] = value
    return tensor


BAD_TENSORS = {
    "missing": ({n: t for n, t in example().tensors().items() if n != "cei"}, "cei: missing"),
    "wrong dtype": (tensors(k=torch.tensor([1, 2, 3])), "k: dtype torch.int64, must be torch.int32"),
    "half precision": (tensors(cei=example().cei.half()), "cei: dtype torch.float16"),
    "wrong shape": (tensors(cei=torch.zeros(M, N + 1)), "cei: shape [3, 7], must be [3, 6]"),
    "transposed": (tensors(swap_rate=torch.zeros(5, M)), "swap_rate: shape [5, 3], must be [3, 5]"),
    "no layer": (tensors(layer_index=torch.zeros(0, dtype=torch.int32)), "layer_index: shape [0]"),
    "NaN": (tensors(cei_raw=changed("cei_raw", torch.nan)), "cei_raw: nan at [0, 1], must be finite"),
    "infinity": (tensors(rki=changed("rki", -torch.inf)), "rki: -inf at [1], must be finite"),
    "k of 0": (tensors(k=changed("k", 0)), "k: 0 at [1], must be in [1, 6]"),
    "k above N": (tensors(k=changed("k", 7)), "k: 7 at [1], must be in [1, 6]"),
    "CEI below 0": (tensors(cei=changed("cei", -0.5)), "cei: -0.5 at [0, 1], must be in [0, 1]"),
    "CEI above 1": (tensors(cei=changed("cei", 1.5)), "cei: 1.5 at [0, 1], must be in [0, 1]"),
    "negative error": (tensors(cei_sem=changed("cei_sem", -1.0)), "cei_sem: -1.0"),
    "negative count": (tensors(cei_count=changed("cei_count", -1)), "cei_count: -1"),
    "layers equal": (
        tensors(layer_index=changed("layer_index", 1)),
        "layer_index: 1 at [1], must be ascending",
    ),
    "layer negative": (tensors(layer_index=changed("layer_index", -2)), "layer_index: -2"),
    "layer too high": (
        tensors(layer_index=torch.tensor([1, 2, 5], dtype=torch.int32)),
        "layer_index: 5 at [2], must be below 5",
    ),
    "sum is not the recorded one": (tensors(k=changed("k", 4)), "config.budget.sum: 6, but k sums to 8"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_field_and_value(tmp_path, case):
    bad, says = BAD_TENSORS[case]
    assert_refused(write(tmp_path, raw_bytes(bad)), says)


BAD_METADATA = {
    "no metadata": ({"unrelated": "x"}, "format: None"),
    "later major version": ({"format": "cor-scores/2", "config": "{}"}, "update cor-vllm"),
    "another format": ({"format": "pt", "config": "{}"}, "format: 'pt'"),
    "no config": ({"format": "cor-scores/1"}, "config: "),
    "config is not JSON": ({"format": "cor-scores/1", "config": "{not json"}, "config: Invalid JSON"),
    "config is a list": ({"format": "cor-scores/1", "config": "[]"}, "config: "),
    "deeply nested": ({"format": "cor-scores/1", "config": "[" * 100_000}, "config: "),
}
BAD_CONFIG = {
    "model__top_k": (0, "config.model.top_k"),
    "model__num_experts": ("many", "config.model.num_experts"),
    "model__fingerprint": ("../../etc/passwd", "config.model.fingerprint"),
    "budget__rule": ("magic", "config.budget.rule"),
    "serving__lambda": (-1, "config.serving.lambda"),
    "calibration__tau_high": (float("nan"), "config.calibration.tau_high"),
    "calibration__corpus": ("a\nb\x1b[2J" * 100, None),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata_is_refused(tmp_path, case):
    metadata, says = BAD_METADATA[case]
    assert_refused(write(tmp_path, raw_bytes(metadata=metadata)), says)


@pytest.mark.parametrize("field", BAD_CONFIG)
def test_bad_config_is_refused_by_field(tmp_path, field):
    value, says = BAD_CONFIG[field]
    path = write(tmp_path, raw_bytes(metadata={
        "format": "cor-scores/1", "config": json.dumps(config(**{field: value})),
    }))  # fmt: skip
    if says is None:
        assert load(path).config.calibration.corpus == value  # odd, but a name is only ever a name
    else:
        assert_refused(path, says)


def assert_refused(path, says: str) -> None:
    with pytest.raises(ScoresError) as caught:
        load(path)
    line = str(caught.value)
    assert says in line
    assert str(path) in line
    assert "\n" not in line
    assert len(line) < 600
    assert ";" in line  # cause; remedy


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "header"),
        (b"\x01\x02", "header"),
        (b"this is no safetensors file at all", "header"),
        (struct.pack("<Q", 2**63) + b"{}", "header"),
        (struct.pack("<Q", 2**22 + 1) + b" " * (2**22 + 1), "more than 4194304"),
        (header(b"[]"), "not a JSON object"),
        (header(b"{"), "not JSON"),
        (header(b"[" * 100_000), "not JSON"),
        (header(b'{"cei": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}'),
         "not a complete safetensors file"),
        (raw_bytes()[:-1], "not a complete safetensors file"),
        (raw_bytes()[:200], "cut off"),
        (raw_bytes() + b"tail", "not a complete safetensors file"),
    ],
)  # fmt: skip
def test_what_is_no_complete_file_is_refused(tmp_path, data, says):
    assert_refused(write(tmp_path, data), says)


def test_paths_that_are_no_file_are_refused(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert_refused(tmp_path, "is a directory")
    assert_refused(loop, "symbolic links")
    assert_refused(pipe, "not a regular file")
    assert_refused(tmp_path / "absent", "No such file")


def test_a_file_beyond_any_calibration_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "huge"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte by its size alone
    assert_refused(path, "no scores file")


def test_save_refuses_what_load_would_refuse_and_leaves_nothing(tmp_path):
    path = tmp_path / "scores.safetensors"
    with pytest.raises(ScoresError, match="cei_raw: nan"):
        save(path, dataclasses.replace(example(), cei_raw=changed("cei_raw", torch.nan)))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.safetensors"
    save(path, example())
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scores_file.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(path, dataclasses.replace(example(), rki=torch.zeros(M)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
