"""The options of a calibration: one frozen, validated object, made from the command line."""

import argparse
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cor_vllm.errors import CorError, invalid

DEFAULT_CORPUS = "default"
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Options = TypeVar("Options", bound=BaseModel)
Ablation = Literal["backfill", "drop"]
PerturbTarget = Literal["moe", "layer"]
Scope = Literal["token", "sequence"]


class CalibrationError(CorError):
    """A calibration that cannot be done as asked: one line with what is wrong and what to do."""


class CalibrationOptions(BaseModel):
    """Every option of `cor-vllm calibrate`; the defaults are the command line's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(min_length=1)
    output: Path
    # None means the shipped corpus. With token_ids it means that there is no held-out text.
    corpus: str | None = Field(default=None, min_length=1)
    answers: Path | None = None
    token_ids: Path | None = None
    positions: Path | None = None
    num_tokens: int = Field(default=1000, ge=1)
    seq_len: int = Field(default=256, ge=2)
    hard_percentile: float = Field(default=90.0, gt=0, lt=100)
    easy_percentile: float = Field(default=10.0, gt=0, lt=100)
    delta: float = Field(default=0.1, gt=-1)
    epsilon: float = Field(default=1e-6, gt=0)  # nats
    ablation: Ablation = "backfill"
    scope: Scope = "token"
    perturb_scope: Scope = "sequence"
    perturb_target: PerturbTarget = "moe"
    algorithm: Literal["sweep", "plain"] = "sweep"
    intensity: Literal["ratio", "hard", "marginal"] = "marginal"
    budget: Literal["exact", "paper"] = "exact"
    k_min: int | None = Field(default=None, ge=1)
    k_max: int | None = Field(default=None, ge=1)
    heldout_tokens: int = Field(default=1000, ge=0)
    tune: bool = False
    shrink: bool = False
    seed: int = Field(default=0, ge=0, lt=2**31)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    max_memory: int = Field(default=2 * 10**9, ge=1)  # bytes
    resume: bool = True
    cor_router: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_depend(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Only `plain` ablates whole sequences; the paper's rounding belongs to the paper's own R_l."""
        algorithm = "plain" if values.get("scope") == "sequence" else "sweep"
        intensity = "ratio" if values.get("budget") == "paper" else "marginal"
        return {"algorithm": algorithm, "intensity": intensity} | values

    @field_validator("max_memory", mode="before")
    @classmethod
    def _bytes(cls, value: object) -> object:
        return parse_bytes(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.delta == 0:
            raise ValueError("--delta 0 perturbs nothing; give another value, the default is 0.1")
        if self.algorithm == "sweep" and self.scope == "sequence":
            raise ValueError(
                "--scope sequence takes an expert away at every position, which the sweep does not cover; "
                "leave out --algorithm, or give --algorithm plain"
            )
        if self.easy_percentile > self.hard_percentile:
            raise ValueError("--easy-percentile must not exceed --hard-percentile")
        if self.answers and self.token_ids:
            raise ValueError("--answers and --token-ids both name the calibration sequences; give one")
        if self.positions and not self.token_ids:
            raise ValueError("--positions counts positions in given sequences; give them with --token-ids")
        if self.budget == "paper" and self.intensity == "marginal":
            raise ValueError("--budget paper rounds proportional quotas, which --intensity marginal has not")
        if self.budget == "paper" and (self.k_min or self.k_max):
            raise ValueError("--k-min and --k-max do not apply to --budget paper, which knows no bounds")
        if self.k_min and self.k_max and self.k_min > self.k_max:
            raise ValueError(f"--k-min {self.k_min} exceeds --k-max {self.k_max}")
        if self.tune and self.heldout_tokens < 2:
            raise ValueError(
                "--tune splits the held-out positions in two; --heldout-tokens must be at least 2"
            )
        if self.tune and self.token_ids and not self.corpus:
            raise ValueError("--tune needs held-out text; with --token-ids, give it by --corpus")
        return self

    @property
    def heldout_corpus(self) -> str | None:
        """The corpus that held-out positions come from, or None if there are to be none."""
        if self.heldout_tokens == 0:
            return None
        return self.corpus if self.token_ids else self.corpus or DEFAULT_CORPUS

    def record(self) -> dict[str, Any]:
        """The options as the scores file keeps them: all but --output and --resume.

        Files are named without their folders, which say nothing about the result.
        """
        values = self.model_dump(mode="json", exclude={"model", "output", "resume"})
        for field in ("corpus", "answers", "token_ids", "positions", "cor_router"):
            if values[field] is not None:
                values[field] = Path(values[field]).name
        if self.cor_router is None:  # files without one keep their bytes
            del values["cor_router"]
        return values


def check_output(output: Path) -> None:
    """Raise a CalibrationError if the file that --output names could not be written."""
    if output.is_dir():
        raise CalibrationError(f"--output {output}: is a folder; give the name of a file")
    if output.exists() and not output.is_file():  # for instance a device, which the file would replace
        raise CalibrationError(f"--output {output}: is not a regular file; give the name of a file")
    if not output.parent.is_dir():
        raise CalibrationError(f"--output {output}: there is no folder {output.parent}; create it first")
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise CalibrationError(
            f"--output {output}: {output.parent} cannot be written to ({error.strerror})"
        ) from None


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Inside, the result is written; a CalibrationError if that fails, whose measurements are kept."""
    try:
        yield
    except OSError as error:
        raise CalibrationError(
            f"--output {output}: cannot be written ({error.strerror}); make room there, and the same "
            "command goes on from where it stopped"
        ) from None


def options_of(kind: type[Options], args: argparse.Namespace) -> Options:
    """The options of a command out of its arguments.

    Raises:
        CalibrationError: one of them cannot be; one line with its flag.
    """
    # Named one by one: a flag without a field must not go unnoticed.
    own = {name: value for name, value in vars(args).items() if name not in ("handler", "rest", "json")}
    try:
        return kind(**own)
    except ValidationError as error:
        where, message, _ = invalid(error)
        option = f"--{where[0].replace('_', '-')}: " if where else ""
        raise CalibrationError(option + message) from None


def parse_bytes(text: str) -> int:
    """ "2GB", "512 MiB" or "1000000" (bytes) as a number of bytes.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = (match[2].upper() or "B") if match else ""
    if match is None or unit not in UNITS:
        raise ValueError(f"{text!r} is not a size; write it like 2GB, 512MiB or 1000000")
    return int(float(match[1]) * UNITS[unit])
