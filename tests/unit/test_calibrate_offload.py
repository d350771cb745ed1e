"""Weights that wait in host memory or on disk: the same bits, each weight brought once a pass."""

import io
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from rich.console import Console

from cor_vllm.calibrate.config import CalibrationError, CalibrationOptions
from cor_vllm.calibrate.interventions.measurement import LayerMeasurement, baseline
from cor_vllm.calibrate.interventions.sweep import Sweep
from cor_vllm.calibrate.model import limits, loading, offload
from cor_vllm.calibrate.model.forward import batch_losses
from cor_vllm.calibrate.model.limits import Limit
from cor_vllm.calibrate.model.loading import load_model
from cor_vllm.calibrate.model.memory import bytes_per_row
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.offload import MAPPED, Room, Weights, held, offload_folder, weights_of
from cor_vllm.calibrate.pipeline import calibrate
from cor_vllm.calibrate.text.stratify import stratify
from cor_vllm.testing import tiny_models

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "model"


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build(request.param, tmp_path_factory.mktemp(request.param))


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Host memory as if so many bytes of it were free."""
    monkeypatch.setattr(limits, "host_limit", lambda mapped=0: Limit(size, size, "under a made-up limit"))


@contextmanager
def no_memory() -> Iterator[None]:
    """Inside, no host memory is free."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        free(monkeypatch, 0)
        yield


def offloaded(kind: str, checkpoint: Path, folder: Path) -> MoeModel:
    if kind == "disk":
        with no_memory():
            return load_model(checkpoint, "auto", "auto", Room(folder=folder))
    model = load_model(checkpoint, "auto", "cpu")
    cpu_offload(model.model, execution_device=torch.device("cpu"))
    return model


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each weight was read from where it waits, by name."""
    counts: Counter[str] = Counter()
    for owner in (OffloadedWeightsLoader, PrefixedDataset):
        read = owner.__getitem__

        def counted(self: Any, key: str, read: Any = read, owner: Any = owner) -> Any:
            if owner is OffloadedWeightsLoader or isinstance(self.dataset, dict):  # the innermost map
                counts[getattr(self, "prefix", "") + key] += 1
            return read(self, key)

        monkeypatch.setattr(owner, "__getitem__", counted)
    return counts


def sequences() -> list[list[int]]:
    """More tokens than one baseline batch holds, of unequal length."""
    generator = torch.Generator().manual_seed(3)
    lengths = (13, 400, 7, 21)
    return [torch.randint(0, 512, (length,), generator=generator).tolist() for length in lengths]


def run(model: MoeModel) -> tuple[torch.Tensor, list[LayerMeasurement]]:
    """Baseline and sweep in several batches, chunks and blocks."""
    block = 400 * bytes_per_row(model.config, 400, 4)
    options = CalibrationOptions(
        model="m", output=Path("o"), intensity="marginal", perturb_scope="token", max_memory=block
    )
    base = baseline(model, sequences())
    sweep = Sweep(model, options, sequences(), base, stratify(base.losses, 96, 5))
    for step in range(len(sweep.work())):
        sweep.step(step)
    return base.losses, sweep.result()


@pytest.mark.parametrize("kind", ["disk", "host"])
def test_the_same_bits_and_each_weight_once_a_pass(
    kind: str, checkpoint: Path, tmp_path: Path, brought: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Several batches of the baseline.
    monkeypatch.setattr("cor_vllm.calibrate.model.batches.TOKENS_PER_FORWARD", 400)
    losses, measured = run(load_model(checkpoint, "auto", "cpu"))
    model = offloaded(kind, checkpoint, tmp_path / "waiting")
    assert model.offloaded and all(p.is_meta for p in model.model.parameters())
    names = {name for name, _ in model.model.named_parameters()}
    brought.clear()
    offloaded_losses, offloaded_measured = run(model)
    assert dict(brought) == dict.fromkeys(names, 2)  # baseline, sweep
    assert all(p.is_meta for p in model.model.parameters()), "weights left behind"
    assert torch.equal(losses, offloaded_losses)
    for one, other in zip(measured, offloaded_measured, strict=True):
        for name, values in one.tensors().items():
            assert torch.equal(values, other.tensors()[name]), name


def test_a_whole_calibration_from_disk(checkpoint: Path, tmp_path: Path, brought: Counter[str]) -> None:
    """The file has the same tensors, at most four passes are made, and the folder is gone."""
    scores = {}
    for device in ("cpu", "auto"):
        options = CalibrationOptions(
            model=str(checkpoint), output=tmp_path / device, device=device, num_tokens=60, seq_len=20,
            heldout_tokens=40, hard_percentile=80,
        )  # fmt: skip
        with no_memory() if device == "auto" else nullcontext():
            scores[device] = calibrate(options, Console(file=io.StringIO()))
    assert set(brought.values()) == {4}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["auto", "cpu"]
    one, other = scores.values()
    for field in ("k", "cei", "cei_raw", "cei_sem", "rki", "router_prob", "swap_rate"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field
    assert one.config.heldout == other.config.heldout


def test_without_a_device_weights_that_do_not_fit_wait_on_disk(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And do not fit: once loaded, together with what the calibration needs, or on the way."""
    weights, room = weights_of(loading.read_config(checkpoint), torch.float32), Room(100, 200, tmp_path / "w")
    for size, offloaded in (
        (0, True),
        (weights.size + 1, True),
        (weights.peak - 1, True),
        (weights.peak, False),
        (10**12, False),
    ):
        free(monkeypatch, size)
        lines: list[str] = []
        assert load_model(checkpoint, "auto", None, room, lines.append).offloaded == offloaded
        [line] = lines
        assert "of weights in float32, up to" in line and "are free under a made-up limit; they go to" in line
        assert ("waits on disk" in line) == offloaded
    free(monkeypatch, weights.peak)
    enough = Room(weights.peak, 0, tmp_path / "w")
    assert load_model(checkpoint, "auto", None, enough).offloaded


def test_a_part_of_the_layers_in_memory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_model(checkpoint, "auto", "cpu")
    weights = weights_of(plain.config, torch.float32)
    assert weights.size == sum(p.nbytes for p in plain.model.parameters())
    free(monkeypatch, int((weights.size + weights.scattered) * 0.9) + weights.passing)
    model = load_model(checkpoint, "auto", "auto", Room(folder=tmp_path / "w"))
    assert len({p.is_meta for p in model.model.parameters()}) == 2
    assert torch.equal(run(plain)[0], run(model)[0])


def test_no_room_on_disk(checkpoint: Path) -> None:
    expected = r"^\d+ MB of \d+ MB of weights fit into no memory, and None has 0 MB for them"
    with no_memory(), pytest.raises(CalibrationError, match=expected):
        load_model(checkpoint, "auto", "auto")


def test_without_accelerate(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match="needs accelerate"):
        offload.placement(Weights(10), torch.device("cpu"), Room())


def test_weights_leave_when_a_call_fails(checkpoint: Path, tmp_path: Path) -> None:
    model = offloaded("disk", checkpoint, tmp_path / "w")
    layer = model.decoder_layers[0]
    with pytest.raises(ZeroDivisionError), held(layer):
        assert not any(p.is_meta for p in layer.parameters())
        raise ZeroDivisionError
    assert all(p.is_meta for p in layer.parameters())


def test_the_folder_of_a_killed_run_is_removed_and_a_foreign_one_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "o.offload"
    folder.mkdir()
    (folder / "weight.dat").touch()
    with offload_folder(tmp_path / "o"):
        assert not folder.exists()
    folder.mkdir()
    (folder / "thesis.txt").touch()
    with pytest.raises(CalibrationError, match=r"o\.offload: is in the way"), offload_folder(tmp_path / "o"):
        pass
    assert (folder / "thesis.txt").exists()


def test_tied_embeddings_wait_on_disk_too(tmp_path: Path) -> None:
    checkpoint = tiny_models.build("qwen3_moe", tmp_path / "tied", tie_word_embeddings=True)
    plain, model = load_model(checkpoint, "auto", "cpu"), offloaded("disk", checkpoint, tmp_path / "w")
    assert torch.equal(run(plain)[0], run(model)[0])


def test_a_gpu_is_filled_first_but_for_what_the_sweep_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 500)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1000, 2000))
    room = Room(device=100, host=200, folder=tmp_path / "w")
    placed = offload.placement(Weights(10**4), torch.device("cuda"), room)
    assert placed["max_memory"] == {0: 850, "cpu": 300}
    assert offload.placement(Weights(10), torch.device("cpu"), room)["max_memory"] == {"cpu": 200}
    # What is lost between small weights, and what passes through, is not there for others.
    lossy = Weights(1000, small=1000, largest=20)
    placed = offload.placement(lossy, torch.device("cpu"), room)
    assert placed["max_memory"] == {"cpu": int(140 * 1000 / (1000 + lossy.scattered))}


def test_what_loading_takes_is_counted_from_above() -> None:
    """A large weight counts once, its parts for a moment thrice; small ones leave gaps."""
    weights = Weights(size=1000, small=200, largest=300)
    assert weights.peak == 1000 + int(offload.SCATTER * 200) + 3 * 300
    config = tiny_models.create("qwen3_moe").config
    config.vocab_size = MAPPED // 4 // config.hidden_size  # two weights of just MAPPED bytes in float32
    counted = weights_of(config, torch.float32)
    assert counted.largest == MAPPED and counted.small == counted.size - 2 * MAPPED
    halved = weights_of(config, torch.bfloat16)
    assert halved.size == counted.size / 2 and halved.small == halved.size


def test_a_device_that_is_asked_for_and_has_no_room(checkpoint: Path) -> None:
    expected = "--device cpu: .* are free under a made-up limit; give --device auto"
    with no_memory(), pytest.raises(CalibrationError, match=expected):
        load_model(checkpoint, "auto", "cpu")


def test_weights_are_read_one_at_a_time(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' threads would hold every weight twice; its switch is put back afterwards."""
    from transformers import core_model_loading

    def pool(*args: Any, **kwargs: Any) -> None:
        pytest.fail("weights are read ahead, by threads")

    monkeypatch.setattr(core_model_loading, "ThreadPoolExecutor", pool)
    monkeypatch.delenv(loading.SEQUENTIAL, raising=False)
    load_model(checkpoint, "auto", "cpu")
    assert loading.SEQUENTIAL not in os.environ
    monkeypatch.setenv(loading.SEQUENTIAL, "0")
    load_model(checkpoint, "auto", "cpu")
    assert os.environ[loading.SEQUENTIAL] == "0"


def test_weights_read_in_place_from_the_checkpoint_give_the_same_bits(
    tmp_path: Path,
) -> None:
    """The demo model keeps its experts as transformers does, at offsets that no allocator would choose."""
    plain, model = load_model(DEMO, "auto", "cpu"), offloaded("disk", DEMO, tmp_path / "w")
    input_ids = torch.randint(0, 4000, (4, 256), generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.losses(input_ids), batch_losses(model, [input_ids])[0][0])


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "nonsense"])
def test_a_checkpoint_that_asks_for_another_attention(tmp_path: Path, name: str) -> None:
    config = tiny_models.build("qwen3_moe", tmp_path / "m") / "config.json"
    text = config.read_text().replace("{", f'{{"attn_implementation": "{name}",', 1)
    config.write_text(text)
    with pytest.raises(
        CalibrationError, match=rf"config\.json: asks for attention by '{name}'.*take the entry"
    ):
        load_model(tmp_path / "m", "auto", None)
    config.write_text(text.replace(name, "eager"))
    assert load_model(tmp_path / "m", "auto", None).config._attn_implementation == "eager"
