"""Lets weights wait in host memory or on disk, by accelerate's device map, and brings each once in a pass.

accelerate's hooks bring a module's weights to the device that computes before each call of the module, and
drop them afterwards. `held` brings them once for all calls inside it. With it, a calibration by the sweep
brings each weight at most five times, layer by layer: for the baseline, the sweep, the held-out check, its
comparison with other settings, and --tune. The plain algorithm brings all weights for each of its forwards.
"""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.model import limits

ALIGNMENT = 64  # bytes, torch's own on the CPU
MAPPED = 32 * 2**20  # bytes from which glibc gives every allocation pages of its own, whatever came before
# Gaps between smaller allocations that nothing fills, as a share of them; measured by
# `python -m benchmarks.memory --load`.
SCATTER = 0.5
FRAGMENTED = 0.95  # share of a CUDA device's free memory that the allocator can use


@contextmanager
def held(*modules: nn.Module) -> Iterator[None]:
    """Inside, all weights of `modules` are on the execution device; the offloaded ones leave afterwards."""
    hooks: list[tuple[nn.Module, Any]] = [
        (part, part._hf_hook)
        for module in modules
        for part in module.modules()
        if getattr(getattr(part, "_hf_hook", None), "offload", False)
    ]
    placed = []
    try:
        for part, hook in hooks:
            placed.append((part, hook))
            hook.pre_forward(part)
            align(part, recurse=False)
            hook.offload = False  # accelerate's own "these weights stay": no call inside moves them
        yield
    finally:
        for part, hook in placed:
            hook.offload = True
            hook.post_forward(part, None)


def align(module: nn.Module, recurse: bool = True) -> None:
    """Move weights that are mapped in place from a checkpoint to where torch would have put them.

    Kernels round differently by alignment. Aligned, a weight gives the same bits wherever it was in its file
    and wherever it waited.
    """
    for parameter in module.parameters(recurse):
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def is_offloaded(model: nn.Module) -> bool:
    """Whether any weight of a model waits elsewhere."""
    return any(parameter.is_meta for parameter in model.parameters())


def waiting_places(model: Any) -> str:
    """Say in words where the weights of an offloaded model wait."""
    names = {"cpu": "in host memory", "disk": "on disk"}
    used = {str(place) for place in model.hf_device_map.values()}
    return " and ".join(words for place, words in names.items() if place in used)


def execution_device(module: nn.Module) -> torch.device:
    """The device of a module with a `weight`: the one that accelerate brings it to, or the one it is on."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    weight = module.weight
    assert isinstance(weight, torch.Tensor), "an embedding has a weight"
    return weight.device


@dataclass(frozen=True)
class Weights:
    """How much memory a model's weights take, in bytes."""

    size: int  # once loaded
    small: int = 0  # the part of it in weights smaller than MAPPED
    largest: int = 0  # the largest weight

    @property
    def scattered(self) -> int:
        """An upper bound of what is lost between small weights."""
        return int(SCATTER * self.small)

    @property
    def passing(self) -> int:
        """An upper bound of what transformers takes for a moment.

        It reads a weight of all experts of a layer expert by expert, in the wanted dtype, and stacks them;
        then it joins gate and up projections.
        """
        return 3 * self.largest

    @property
    def peak(self) -> int:
        """An upper bound of what loading them into host memory takes at its worst."""
        return self.size + self.scattered + self.passing


def weights_of(config: Any, dtype: torch.dtype) -> Weights:
    """How much memory a model's weights take in a dtype; counts them on a model without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = [parameter.numel() * dtype.itemsize for parameter in model.parameters()]
    return Weights(sum(sizes), sum(size for size in sizes if size < MAPPED), max(sizes))


@dataclass(frozen=True)
class Room:
    """The memory that a calibration needs besides the weights, and where weights may wait on disk."""

    device: int = 0  # bytes on the device that computes
    host: int = 0  # bytes in host memory
    folder: Path | None = None  # None: no weight may go to disk


def placement(weights: Weights, device: torch.device, room: Room) -> dict[str, Any]:
    """Arguments of `from_pretrained` that let weights go to the device, then to the host, then to disk.

    Args:
        weights: how much they take.
        device: the device that computes.
        room: what to leave free, and the folder on disk.

    Raises:
        CalibrationError: accelerate is not installed, or the disk has no room either.
    """
    size = weights.size
    if importlib.util.find_spec("accelerate") is None:
        raise CalibrationError(
            f"the weights take {in_words(size)} and would have to wait in host memory or on disk, which "
            "needs accelerate: install it, or give --device cpu or cuda"
        )
    host = limits.host_limit().free - room.host - weights.passing
    if device.type != "cuda":
        host -= room.device
    places: dict[int | str, int] = {"cpu": max(0, int(host * size / (size + weights.scattered)))}
    if device.type == "cuda":
        usable = int(FRAGMENTED * torch.cuda.mem_get_info(device)[0]) - room.device
        places = {device.index or 0: max(0, usable), **places}
    beyond = size - sum(places.values())
    if beyond > 0:
        space = shutil.disk_usage(room.folder.parent).free if room.folder else 0
        if beyond > space:
            raise CalibrationError(
                f"{in_words(beyond)} of {in_words(size)} of weights fit into no memory, and {room.folder} "
                f"has {in_words(space)} for them; make room, or put --output where there is some"
            )
    return {"device_map": "auto", "max_memory": places, "offload_folder": room.folder}


def in_words(size: int) -> str:
    """Write a number of bytes as "1.5 GB" or "20 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.0f} MB"


@contextmanager
def offload_folder(output: Path) -> Iterator[Path]:
    """The folder `<output>.offload` for weights that wait on disk: created when needed, removed at the end.

    What a killed run left there is removed first.

    Raises:
        CalibrationError: something else has that name.
    """
    folder = output.with_name(output.name + ".offload")
    foreign = [path.name for path in folder.iterdir() if path.suffix != ".dat"] if folder.is_dir() else []
    if foreign or (folder.exists() and not folder.is_dir()):
        raise CalibrationError(f"{folder}: is in the way of weights that wait on disk; move it elsewhere")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
