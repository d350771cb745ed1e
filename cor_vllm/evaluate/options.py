"""Every option of `cor-vllm evaluate`, and the files that they name."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cor_vllm import overlay as overlay_file
from cor_vllm import scores as scores_file
from cor_vllm.errors import invalid
from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.evaluate.conditions import (
    PERMUTATIONS,
    ROUTER_DRAWS,
    Condition,
    Sources,
    as_measured,
    references,
    router_rows,
    table,
)
from cor_vllm.overlay import RouterOverlay

Backend = Literal["vllm", "transformers", "server"]
FLAGS = {
    "lambda_": "cor-lambda",
    "router": "cor-router",
    "scores": "cor-scores",
    "servers": "server",
}  # if it is not the field


class EvaluateOptions(BaseModel):
    """Every option of `cor-vllm evaluate`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1)
    output: Path
    scores: Path | None = None
    router: Path | None = None
    also: dict[str, Path] = {}
    servers: dict[str, str] = {}
    served_name: str | None = None
    backend: Backend = "vllm"
    tasks: tuple[str, ...] = ("factual",)
    conditions: tuple[str, ...] = ("quick",)
    data: Path | None = None
    limit: int | None = Field(default=None, ge=1)
    permutations: int = Field(default=PERMUTATIONS, ge=1)
    router_draws: int = Field(default=ROUTER_DRAWS, ge=1)
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
    """The scores files; none if a router file was given alone.

    Raises:
        EvaluationError: neither was given, or scores were measured under a router that was not given.
        ScoresError, OverlayError: a file cannot be read.
    """
    if options.scores is None:
        _check_without_scores(options)
        return {}
    files = {"": options.scores, **options.also}
    sources = {name: scores_file.load(path) for name, path in files.items()}
    overlay = read_overlay(options)
    for name, scores in sources.items():
        _check_measured_under(files[name], scores.config.model.router_overlay, overlay)
    return sources


def _check_without_scores(options: EvaluateOptions) -> None:
    if options.router is None:
        raise EvaluationError(
            "give --cor-scores FILE; `cor-vllm evaluate` also takes --cor-router FILE, or --server NAME=URL "
            "for servers that run already"
        )
    for flag, value in (("--also", options.also), ("--cor-lambda", options.lambda_)):
        if value not in ({}, None):
            raise EvaluationError(f"{flag}: is of --cor-scores, which is not given")


def _check_measured_under(path: Path, fingerprint: str | None, overlay: RouterOverlay | None) -> None:
    """Scores say nothing of a router other than the one that they were measured with."""
    if fingerprint is None or (overlay is not None and fingerprint == overlay.fingerprint):
        return
    given = "none was given" if overlay is None else f"that of --cor-router is {overlay.fingerprint[:12]}"
    raise EvaluationError(
        f"{path}: these scores were measured under the router of a router file (fingerprint "
        f"{fingerprint[:12]}), and {given}: give `cor-vllm evaluate` that file as --cor-router, or calibrate "
        "the model without one"
    )


def read_overlay(options: EvaluateOptions) -> RouterOverlay | None:
    """The router file; None if none was given.

    Raises:
        OverlayError: it cannot be read.
    """
    return None if options.router is None else overlay_file.load(options.router)


def available(options: EvaluateOptions) -> list[Condition]:
    """Every condition that the given files have."""
    sources = read_sources(options)
    if not sources:
        return [*references(), *router_rows(options.router_draws)]
    lam = sources[""].config.serving.lambda_ if options.lambda_ is None else options.lambda_
    rows = table(sources, lam, options.permutations)
    if options.router is None:
        return rows
    return [*as_measured(rows, sources), *router_rows(options.router_draws)]


def scores_path(options: EvaluateOptions, condition: Condition) -> Path:
    """The file whose scores a condition takes, and perhaps changes."""
    path = options.also[condition.source] if condition.source else options.scores
    assert path is not None, "a condition with options has scores"
    return path
