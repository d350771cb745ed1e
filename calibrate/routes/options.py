"""The options of a route analysis: frozen, validated objects, made from the command line."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
