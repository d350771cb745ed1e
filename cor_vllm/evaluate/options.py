"""Every option of `cor-vllm evaluate`, and the scores files that they name."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cor_vllm import scores as scores_file
from cor_vllm.errors import invalid
from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.evaluate.conditions import PERMUTATIONS, Condition, Sources, table

Backend = Literal["vllm", "transformers", "server"]
FLAGS = {
    "lambda_": "cor-lambda",
    "scores": "cor-scores",
    "servers": "server",
}  # if it is not the field


class EvaluateOptions(BaseModel):
    """Every option of `cor-vllm evaluate`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)
    output: Path
    scores: Path | None = None
    also: dict[str, Path] = {}
    servers: dict[str, str] = {}
    served_name: str | None = None
    backend: Backend = "vllm"
    tasks: tuple[str, ...] = ("factual",)
    conditions: tuple[str, ...] = ("quick",)
    data: Path | None = None
    limit: int | None = Field(default=None, ge=1)
    permutations: int = Field(default=PERMUTATIONS, ge=1)
    lambda_: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    batch_size: int = Field(default=16, ge=1)
    max_model_len: int | None = Field(default=None, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**31)
    dtype: str = "auto"
    device: str | None = None
    engine: dict[str, Any] = {}

    @classmethod
    def of(cls, **values: Any) -> "EvaluateOptions":
        """Validate; EvaluationError with the flag and what it must be."""
        try:
            return cls(**values)
        except ValidationError as error:
            (field, *_), message, _ = invalid(error)
            flag = "--" + FLAGS.get(field, field).replace("_", "-")
            name = "MODEL" if field == "model" else flag
            raise EvaluationError(f"{name} {values[field]}: {message}") from None


def read_sources(options: EvaluateOptions) -> Sources:
    """The scores files.

    Raises:
        EvaluationError: none was given.
        ScoresError: one cannot be read.
    """
    if options.scores is None:
        raise EvaluationError("give --cor-scores FILE, or --server NAME=URL for servers that run already")
    files = {"": options.scores, **options.also}
    return {name: scores_file.load(path) for name, path in files.items()}


def available(options: EvaluateOptions) -> list[Condition]:
    """Every condition that these scores files have."""
    sources = read_sources(options)
    lam = sources[""].config.serving.lambda_ if options.lambda_ is None else options.lambda_
    return table(sources, lam, options.permutations)


def scores_path(options: EvaluateOptions, condition: Condition) -> Path:
    """The file whose scores a condition takes, and perhaps changes."""
    path = options.also[condition.source] if condition.source else options.scores
    assert path is not None, "a condition with options has scores"
    return path
