"""Finds checkpoints, says whether they can be calibrated, and loads them into memory."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cor_vllm import overlay
from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.model import limits
from cor_vllm.calibrate.model.families import check_family, num_experts
from cor_vllm.calibrate.model.layers import FOLLOWED
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.offload import Room, Weights, align, in_words, placement, weights_of
from cor_vllm.checkpoint import FingerprintError, weight_names
from cor_vllm.copies import compare
from cor_vllm.errors import first_line
from cor_vllm.fingerprint import Routers
from cor_vllm.metadata import ModelInfo
from cor_vllm.overlay import RouterOverlay

NO_ROOM = Room()
SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"


def model_folder(name: str) -> tuple[Path, str | None]:
    """Find the folder of a model, given as a folder or hub id, and the hub's commit (None for a folder)."""
    if Path(name).is_dir():
        return Path(name), None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def download(*patterns: str) -> Path:
        # GPT-OSS keeps second copies of its weights in folders.
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))

    try:
        folder = download("*.json", "*.model", "*.txt", "*.jinja")
        download(*weight_names(folder))
    except FingerprintError as error:
        raise CalibrationError(str(error)) from None
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise CalibrationError(f"{name}: neither a folder nor a model that the hub gives: {reason}") from None
    return folder, folder.name


def load_tokenizer(name: str | Path) -> Any:
    """Load the tokenizer of a folder or hub id.

    Raises:
        CalibrationError: there is none, or it makes no tokens of a text. transformers gives such an empty
            tokenizer for a folder without a tokenizer's files.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        reason = "" if tokenizer("A text.").input_ids else "it makes no tokens of a text"
    except Exception as error:  # from files, from the hub, from tokenizers that lack a package
        reason = first_line(error)
    if reason:
        raise CalibrationError(f"{name}: no usable tokenizer ({reason}); add the files of the model's own")
    return tokenizer


def read_config(folder: Path) -> Any:
    """Read the transformers configuration of a checkpoint of a supported family; loads no weights."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise CalibrationError(
            f"{folder}: holds no config.json; give the folder of a transformers checkpoint"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise CalibrationError(f"{folder}/config.json: {first_line(error)}") from None
    check_family(config)
    if config._attn_implementation not in (None, *FOLLOWED):
        raise CalibrationError(
            f"{folder}/config.json: asks for attention by {config._attn_implementation!r}; calibration knows "
            f"{' and '.join(FOLLOWED)}, take the entry out"
        )
    return config


def model_info(name: str, folder: Path, revision: str | None, config: Any, routers: Routers) -> ModelInfo:
    """What a result's file says of the model that it belongs to.

    Args:
        name: folder or hub id, as the user gave it.
        folder, revision: of `model_folder`.
        config: of `read_config`.
        routers: those of the folder.
    """
    return ModelInfo(
        name=name if revision else folder.resolve().name,
        revision=revision,
        architecture=config.architectures[0],
        num_experts=num_experts(config),
        top_k=config.num_experts_per_tok,
        num_hidden_layers=config.num_hidden_layers,
        fingerprint=routers.fingerprint,
        routers=list(routers.info),
    )


def fitting(path: Path, info: ModelInfo) -> RouterOverlay:
    """Read a router file that has to belong to a model.

    Args:
        path: the router file.
        info: the model's, of `model_info`.

    Raises:
        OverlayError: it cannot be read.
        CalibrationError: it is of another model.
    """
    found = overlay.load(path)
    of_file = found.config.model
    if of_file.fingerprint != info.fingerprint:
        same = of_file.routers and info.routers and not compare(of_file.routers, info.routers).other
        if not same:
            raise CalibrationError(
                f"--cor-router {path}: fingerprint: the router file has {of_file.fingerprint}, the model has "
                f"{info.fingerprint}; write one for this model with `cor-vllm reroute`"
            )
    return found


def load_model(
    folder: Path,
    dtype: str,
    device: str | None,
    room: Room = NO_ROOM,
    say: Callable[[str], None] = lambda line: None,
) -> MoeModel:
    """Load a checkpoint for calibration.

    Args:
        folder: a transformers checkpoint of a supported family.
        dtype: a torch dtype's name, or "auto": float32 on the CPU, the checkpoint's own elsewhere.
        device: where the weights go. "auto" means CUDA if there is one, else the CPU; weights for which it
            has no memory wait in host memory, or in a folder on disk if that is full, too. None means CUDA or
            the CPU if all weights fit, else the same as "auto".
        room: what has to stay free next to the weights, and the folder on disk.
        say: is given one line before the weights load: what they take, what is free, and where they go.

    Raises:
        CalibrationError: the checkpoint cannot be loaded, or there is no memory for it.
    """
    from transformers import Mxfp4Config

    best = "cuda" if torch.cuda.is_available() else "cpu"
    target = _usable_device(best if device in (None, "auto") else device or best)
    if dtype == "auto" and target.type == "cpu":
        dtype = "float32"
    config = read_config(folder)
    extra = _placement(config, folder, dtype, device, target, room, say)
    if getattr(config, "quantization_config", {}).get("quant_method") == "mxfp4":
        # The MXFP4 kernels route inside the kernel and would never call the router module.
        extra["quantization_config"] = Mxfp4Config(dequantize=True)
    model = _from_pretrained(folder, dtype, extra)
    align(model)
    if "device_map" not in extra:
        return MoeModel(model.to(target))
    loaded = MoeModel(model)
    if loaded.device.type != target.type:
        raise CalibrationError(
            f"--device {device or 'auto'}: next to --max-memory, {target} has no room for a single layer; "
            "lower --max-memory, or give --device cpu"
        )
    return loaded


def _from_pretrained(folder: Path, dtype: str, extra: dict[str, Any]) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        # Eager experts loop over the experts that a batch uses. They take any number of experts per token,
        # and use no atomics on distinct ids, so that the same forward gives the same bits.
        with one_weight_at_a_time():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                experts_implementation="eager",
                use_safetensors=True,
                output_loading_info=True,
                **extra,
            )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if limits.out_of_memory(error):
            raise
        raise CalibrationError(f"{folder}: cannot be loaded: {first_line(error)}") from error
    if report["missing_keys"]:
        # transformers would fill them with random numbers and go on.
        missing = sorted(report["missing_keys"])
        raise CalibrationError(
            f"{folder}: {len(missing)} weights are missing, {missing[0]} first; download it again"
        )
    return model


@contextmanager
def one_weight_at_a_time() -> Iterator[None]:
    """Inside, transformers reads a weight when it is its turn.

    By default its threads read ahead without a bound, while the main thread joins the experts of each layer:
    in the worst case all weights are there twice (2.07 times their size, transformers 5.19). The switch is
    transformers' own.
    """
    before = os.environ.get(SEQUENTIAL)
    os.environ[SEQUENTIAL] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SEQUENTIAL]
        else:
            os.environ[SEQUENTIAL] = before


def _placement(
    config: Any,
    folder: Path,
    dtype: str,
    device: str | None,
    target: torch.device,
    room: Room,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Arguments of `from_pretrained` about devices; empty if all weights go to one device."""
    kind = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    weights = weights_of(config, kind)
    host = limits.host_limit(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    on_the_way = weights.peak <= host.free  # all weights pass through host memory first
    name = str(kind).removeprefix("torch.")
    takes = (
        f"{in_words(weights.size)} of weights in {name}, up to {in_words(weights.peak)} of host memory while "
        f"they load; {in_words(host.free)} are free {host.name}"
    )
    if device not in (None, "auto"):
        if not on_the_way:
            raise CalibrationError(
                f"--device {device}: {takes}; give --device auto, with which weights wait on disk, or "
                "--dtype bfloat16"
            )
        say(f"{takes}; they go to {target}")
        return {}
    if device is None and on_the_way and _fits(weights, host.free, target, room):
        say(f"{takes}; they go to {target}")
        return {}
    extra = placement(weights, target, room)
    order = "to host memory" if target.type == "cpu" else f"to {target}, then to host memory"
    say(f"{takes}; they go {order}, and what does not fit waits on disk, in {room.folder}")
    return extra


def _fits(weights: Weights, free: int, target: torch.device, room: Room) -> bool:
    """Whether there is room for all weights and for the calibration next to them.

    Args:
        free: bytes of host memory.
    """
    if target.type == "cuda":
        return weights.size + room.device <= torch.cuda.mem_get_info(target)[0] and room.host <= free
    return weights.size + weights.scattered + room.device + room.host <= free


def _usable_device(device: str) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise CalibrationError(f"--device {device}: not usable here ({reason})") from None
    return target
