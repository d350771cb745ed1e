"""Files of tensors with a JSON object about them: what a scores file and a router file have in common.

Each is one safetensors file whose metadata has `format` and `config`. Reading executes nothing, imports
nothing and opens no other file; nothing is allocated on the word of a header, only the file's own bytes.
"""

import dataclasses
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Generic, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save

from cor_vllm.errors import CorError, invalid, one_line

MAX_FILE_BYTES = 1 << 28  # the scores of 1,000 layers of 2,048 experts need 33 MB
MAX_HEADER_BYTES = 1 << 22
Config = TypeVar("Config", bound=BaseModel)


@dataclasses.dataclass(frozen=True)
class Kind(Generic[Config]):
    """One format of such files, and how its errors speak."""

    format: str  # name and major version, as in the metadata
    noun: str  # goes on after "a" and "no"
    error: type[CorError]
    remedy: str  # goes on after "cause; "
    dtypes: Mapping[str, torch.dtype]  # of every tensor, by its name
    config: type[Config]

    def read_bytes(self, path: str | os.PathLike[str]) -> bytes:
        """The file's bytes; an error if it is not a readable regular file of a plausible size."""
        if not os.fspath(path):
            raise self.error(f"the path is empty; give that of a {self.noun}")
        try:
            with open(path, "rb", opener=_open_without_blocking) as file:
                info = os.fstat(file.fileno())
                if not stat.S_ISREG(info.st_mode):
                    raise self.error(f"{path}: not a regular file; give the path of a {self.noun}")
                if info.st_size > MAX_FILE_BYTES:
                    raise self.error(f"{path}: {info.st_size} bytes, more than {MAX_FILE_BYTES}; this is no "
                                     f"{self.noun}")  # fmt: skip
                return file.read()
        except IsADirectoryError:
            raise self.error(f"{path}: is a directory; give the path of a {self.noun}") from None
        except (OSError, ValueError) as error:
            if isinstance(error, self.error):
                raise
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise self.error(
                f"{path}: cannot be read ({reason}); check the path and its permissions"
            ) from None

    def parse(self, data: bytes, name: str) -> tuple[dict[str, torch.Tensor], Config]:
        """Decode the bytes of a file, all that its format has in common with the others checked.

        Args:
            data: the file.
            name: stands in the error messages.

        Returns:
            The tensors that the format has, each of its dtype, and the config.
        """
        header = self._header(data, name)
        try:
            tensors = safetensors_load(data)
        except (SafetensorError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise self.error(
                f"{name}: not a complete safetensors file ({one_line(error)}); {self.remedy}"
            ) from None
        config = self._config(header.get("__metadata__"), name)
        for field in self.dtypes:
            if field not in tensors:
                raise self.error(f"{name}: {field}: missing; {self.remedy}")
        return {field: tensors[field] for field in self.dtypes}, config

    def is_format_of(self, data: bytes) -> bool:
        """Whether a file says that it has this format, of any version."""
        try:
            metadata = self._header(data, "").get("__metadata__")
        except CorError:
            return False
        found = metadata.get("format") if isinstance(metadata, dict) else None
        return str(found).startswith(f"{self.format.partition('/')[0]}/")

    def check_dtypes(self, tensors: Mapping[str, torch.Tensor], name: str) -> None:
        """Raise an error with the first tensor that has another dtype than the format says."""
        for field, dtype in self.dtypes.items():
            if tensors[field].dtype != dtype:
                raise self.error(
                    f"{name}: {field}: dtype {tensors[field].dtype}, must be {dtype}; {self.remedy}"
                )

    def refuse(self, name: str, field: str, tensor: torch.Tensor, bad: torch.Tensor, rule: str) -> None:
        """Raise an error with the first value of a tensor that `bad`, of its shape, marks; none: return."""
        if bad.any():
            at = bad.nonzero()[0].tolist()
            value = tensor[tuple(at)].item()
            raise self.error(f"{name}: {field}: {value} at {at}, must be {rule}; {self.remedy}")

    def save(self, path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], config: Config) -> None:
        """Write a file atomically: the final name never holds half a file.

        Raises:
            CorError: of this kind, if `path` is a folder, a device or another special file.
            OSError: the file cannot be written (disk full, no permission); nothing is left behind.
        """
        target = Path(path)
        if target.exists() and not target.is_file():  # it would be replaced
            raise self.error(f"{target}: is not a regular file; give the name of a file")
        metadata = {"format": self.format, "config": config.model_dump_json(by_alias=True)}
        data = _ordered(safetensors_save({n: t.contiguous() for n, t in tensors.items()}, metadata))
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise

    def _header(self, data: bytes, name: str) -> dict[str, object]:
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > len(data) - 8:
            raise self.error(f"{name}: header: {len(data)} bytes do not hold it; the file is cut off or no "
                             f"safetensors file, {self.remedy}")  # fmt: skip
        if length > MAX_HEADER_BYTES:
            raise self.error(f"{name}: header: {length} bytes, more than {MAX_HEADER_BYTES}; {self.remedy}")
        try:
            header = json.loads(data[8 : 8 + length])
        except (ValueError, RecursionError) as error:
            raise self.error(f"{name}: header: not JSON ({one_line(error)}); {self.remedy}") from None
        if not isinstance(header, dict):
            raise self.error(f"{name}: header: not a JSON object; {self.remedy}")
        return header

    def _config(self, metadata: object, name: str) -> Config:
        values = metadata if isinstance(metadata, dict) else {}
        found = values.get("format")
        if found != self.format:
            family = self.format.rpartition("/")[0] + "/"
            remedy = "update cor-vllm" if str(found).startswith(family) else self.remedy
            raise self.error(
                f"{name}: format: {one_line(repr(found))}, this version reads {self.format!r}; {remedy}"
            )
        try:
            return self.config.model_validate_json(values.get("config") or "")
        except ValidationError as error:
            where, message, value = invalid(error)
            field = one_line(".".join(["config", *where]))
            raise self.error(f"{name}: {field}: {message}, got {value}; {self.remedy}") from None


def digest(data: bytes) -> str:
    """SHA-256 of a file's bytes: what compile caches and prefix caches are keyed by."""
    return hashlib.sha256(data).hexdigest()


def _open_without_blocking(path: str, flags: int) -> int:
    # A FIFO would block the open for ever; the flag does nothing to a regular file.
    return os.open(path, flags | os.O_NONBLOCK)


def _ordered(data: bytes) -> bytes:
    """The same file with its header's keys in order: safetensors writes the metadata in any."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the tensors to 8 bytes
    return len(header).to_bytes(8, "little") + header + data[end:]


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
