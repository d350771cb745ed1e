"""Checkpoints: where they are, whether they can be calibrated, and getting them into memory."""

from pathlib import Path
from typing import Any

import torch

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.families import check_family
from cor_vllm.calibrate.moe_model import MoeModel
from cor_vllm.calibrate.offload import Room, align, free_bytes, placement, weight_bytes
from cor_vllm.checkpoint import FingerprintError, weight_names

NO_ROOM = Room()


def model_folder(name: str) -> tuple[Path, str | None]:
    """The folder of a model given as a folder or as a hub id, and the hub's commit (None for a folder)."""
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
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(f"{name}: neither a folder nor a model that the hub gives: {reason}") from None
    return folder, folder.name


def read_config(folder: Path) -> Any:
    """The transformers configuration of a checkpoint of a supported family; loads no weights."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise CalibrationError(
            f"{folder}: holds no config.json; give the folder of a transformers checkpoint"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise CalibrationError(f"{folder}/config.json: {str(error).strip().splitlines()[0]}") from None
    check_family(config)
    return config


def load_model(folder: Path, dtype: str, device: str | None, room: Room = NO_ROOM) -> MoeModel:
    """Load a checkpoint for calibration.

    Args:
        folder: a transformers checkpoint of a supported family.
        dtype: a torch dtype's name, or "auto": float32 on the CPU, the checkpoint's own elsewhere.
        device: where to. "auto": CUDA where there is one, else the CPU, and what it has no memory for waits
            in host memory or, beyond that, in a folder on disk. None: CUDA or CPU where all weights fit, else
            as with "auto".
        room: what has to stay free beside the weights, and the folder.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, Mxfp4Config
    from transformers.utils import logging

    best = "cuda" if torch.cuda.is_available() else "cpu"
    target = _usable_device(best if device in (None, "auto") else device or best)
    if dtype == "auto" and target.type == "cpu":
        dtype = "float32"
    config = read_config(folder)
    extra = _placement(config, dtype, device, target, room)
    if getattr(config, "quantization_config", {}).get("quant_method") == "mxfp4":
        # The MXFP4 kernels route inside the kernel and would never call the router module.
        extra["quantization_config"] = Mxfp4Config(dequantize=True)
    logging.disable_progress_bar()
    try:
        # Eager experts loop over the experts that a batch uses: any number of experts per token, and no
        # atomics on distinct ids, so that the same forward gives the same bits.
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            experts_implementation="eager",
            use_safetensors=True,
            output_loading_info=True,
            **extra,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise CalibrationError(f"{folder}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if report["missing_keys"]:
        # transformers would fill them with random numbers and go on.
        missing = sorted(report["missing_keys"])
        raise CalibrationError(
            f"{folder}: {len(missing)} weights are missing, {missing[0]} first; download it again"
        )
    align(model)
    if "device_map" not in extra:
        return MoeModel(model.to(target))
    loaded = MoeModel(model)
    if loaded.device.type != target.type:
        raise CalibrationError(
            f"--device {device or 'auto'}: beside --max-memory, {target} has no room for a single layer; "
            "lower --max-memory, or give --device cpu"
        )
    return loaded


def _placement(
    config: Any, dtype: str, device: str | None, target: torch.device, room: Room
) -> dict[str, Any]:
    """What `from_pretrained` is told about devices; nothing where all weights go to one."""
    if device not in (None, "auto"):
        return {}
    size = weight_bytes(config, (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype))
    needed = size + room.device + (room.host if target.type == "cpu" else 0)
    if device is None and needed <= free_bytes(target):
        return {}
    return placement(size, target, room)


def _usable_device(device: str) -> torch.device:
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(f"--device {device}: not usable here ({reason})") from None
    return target
