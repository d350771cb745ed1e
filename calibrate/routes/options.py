"""The options of a route analysis: frozen, validated objects, made from the command line."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cor_vllm.calibrate.config import parse_bytes
from cor_vllm.calibrate.routes.draw import DrawOptions
from cor_vllm.calibrate.routes.groups import BINS


class TextOptions(BaseModel):
    """The model, and the text whose tokens' routes are compared; the defaults are the command line's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(min_length=1)
    corpus: str | None = Field(default=None, min_length=1)  # None: the shipped one, if no other file is given
    answers: Path | None = None
    trajectories: Path | None = None
    verified: Literal["yes", "no", "all"] = "yes"
    token_ids: Path | None = None
    num_tokens: int = Field(default=10_000, ge=1)
    seq_len: int = Field(default=256, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**31)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        names = ("corpus", "answers", "trajectories", "token_ids")
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each name the text; give one")
        if "verified" in self.model_fields_set and self.trajectories is None:
            raise ValueError("--verified chooses among trajectories; give them with --trajectories")
        return self


class AnalysisOptions(TextOptions):
    """Every option of `cor-vllm analyse`."""

    output: Path
    max_tokens: int | None = Field(default=None, ge=1)
    layers: Literal["final", "all"] | tuple[int, ...] = "final"
    joint: bool = False
    routes: int = Field(default=32, ge=1, le=4096)
    pool: int = Field(default=32, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    bins: tuple[float, float] = (0.9, 0.5)
    null: int = Field(default=1, ge=1)
    max_memory: int = Field(default=2 * 10**9, ge=1)  # bytes
    resume: bool = True
    rows: Path | None = None

    @field_validator("max_memory", mode="before")
    @classmethod
    def _bytes(cls, value: object) -> object:
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("layers", "bins", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        return tuple(value.split(",")) if isinstance(value, str) and value not in ("final", "all") else value

    @field_validator("bins")
    @classmethod
    def _descending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 1 >= value[0] > value[1] > 0:
            raise ValueError("give two probabilities, the higher one first, like 0.9,0.5")
        return value

    @model_validator(mode="after")
    def _a_target_in_each_group(self) -> Self:
        groups = len(BINS) * (1 + self.null)
        if self.max_tokens is not None and self.max_tokens < groups:
            raise ValueError(f"--max-tokens {self.max_tokens}: give at least {groups}, one for each group")
        return self

    @property
    def draws(self) -> DrawOptions:
        """How routes are drawn."""
        return DrawOptions(self.routes, self.pool, self.temperature)

    def record(self) -> dict[str, Any]:
        """The options that determine the result, as the result keeps them; files without their folders."""
        outside = {"model", "output", "resume", "rows", "max_memory"}
        values = self.model_dump(mode="json", exclude=outside)
        for field in ("corpus", "answers", "trajectories", "token_ids"):
            if values[field] is not None:
                values[field] = Path(values[field]).name
        return values
