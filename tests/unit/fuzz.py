"""Mutated files of a format: each is refused with one line or reads back as exactly what it holds."""

import json
import random
import resource
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cor_vllm.errors import CorError

MUTATIONS = 2_500  # for each seed
NUMPY = {"F32": np.float32, "I32": np.int32}


@dataclass(frozen=True)
class Format:
    """What is fuzzed."""

    load: Callable[[Path], Any]
    error: type[CorError]
    config: Callable[[], dict]  # a valid one, new each time
    raw_bytes: Callable[[dict], bytes]  # a file with valid tensors and this config
    sections: tuple[str, ...]  # of the config; those without fractions, which JSON and Python may round


def independent(data: bytes) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors and the config of a safetensors file by the format's description alone."""
    size = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + size])
    metadata, body = entries.pop("__metadata__"), data[8 + size :]
    arrays = {}
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        if entry["dtype"] in NUMPY:
            arrays[name] = np.frombuffer(body[start:end], NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return arrays, json.loads(metadata["config"])


def mutate(data: bytes, rng: random.Random, format: Format) -> bytes:
    out = bytearray(data)
    kind = rng.randrange(8)
    size = struct.unpack("<Q", data[:8])[0]
    if kind == 0:  # bits anywhere
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # bits in the header
        for _ in range(rng.choice([1, 1, 2, 4])):
            out[8 + rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == 2:  # cut off, or a tail
        out = (
            out[: rng.randrange(len(out))]
            if rng.random() < 0.7
            else out + rng.randbytes(rng.randrange(1, 99))
        )
    elif kind == 3:  # the header's length
        out[:8] = struct.pack(
            "<Q", rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1, rng.randrange(2**20)])
        )
    elif kind == 4:  # a number in the header
        digits = [i for i in range(8, 8 + size) if chr(out[i]).isdigit()]
        for _ in range(rng.choice([1, 1, 2])):
            out[rng.choice(digits)] = ord(rng.choice("0123456789-"))
    elif kind == 5:  # a stretch removed, doubled or overwritten
        start = rng.randrange(len(out))
        stretch = slice(start, start + rng.randrange(1, 40))
        out[stretch] = rng.choice([b"", out[stretch] * 2, rng.randbytes(len(out[stretch]))])
    elif kind == 6:  # values in the tensors
        for _ in range(rng.choice([1, 3])):
            at = 8 + size + 4 * rng.randrange((len(out) - 8 - size) // 4)
            value = rng.choice([rng.uniform(-1, 2), np.nan, np.inf, -np.inf, 1e38])
            number = struct.pack("<i", rng.randrange(-2, 9))
            out[at : at + 4] = rng.choice([struct.pack("<f", value), number])
    else:  # a valid file with another value in its config
        values = format.config()
        section = rng.choice([v for v in values.values() if isinstance(v, dict) and v])
        section[rng.choice(list(section))] = rng.choice(
            [None, -1, 0, 1, 10**30, 1e308, "", "x", [], {}, True, "\u0000"]
        )
        return format.raw_bytes(values)
    return bytes(out)


def assert_reads_back(read: Any, data: bytes, format: Format) -> None:
    arrays, stored = independent(data)
    for name, tensor in read.tensors().items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[name])
    for section in format.sections:
        value = read.config.model_dump(by_alias=True)[section]
        value = {key: value[key] for key in stored[section]}
        assert value == stored[section], f"{section}: {value} was read, the file has {stored[section]}"


def check(format: Format, path: Path, seed: int) -> None:
    """Mutate a valid file MUTATIONS times and read each; `path` holds them one after the other."""
    rng = random.Random(seed)
    original = format.raw_bytes(format.config())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = refused = 0
    for _ in range(MUTATIONS):
        data = mutate(original, rng, format)
        path.write_bytes(data)
        signal.alarm(10)  # a hang ends the run
        try:
            read = format.load(path)
        except format.error as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert_reads_back(read, data, format)
            accepted += 1
        signal.alarm(0)
    assert refused > MUTATIONS // 2  # the mutations bite
    assert accepted > MUTATIONS // 50  # and some are harmless
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 64 * 1024, f"{grown} KiB more at the peak: something was allocated on a header's word"
