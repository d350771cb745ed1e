"""The options of `cor-vllm reroute`: one frozen, validated object, made from the command line."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from cor_vllm.calibrate.config import parse_bytes
from cor_vllm.calibrate.reroute.training import Candidate, Objective
from cor_vllm.calibrate.routes.draw import DrawOptions
from cor_vllm.calibrate.routes.options import TextOptions

RATES = (3e-5, 3e-4)
KL_WEIGHTS = (0.0, 1.0)
AUTO: tuple[Objective, ...] = ("ce", "epo", "margin")


class RerouteOptions(TextOptions):
    """Every option of `cor-vllm reroute`; the defaults are the command line's."""

    output: Path
    num_tokens: int = Field(default=20_000, ge=1)
    objective: Literal["auto", "ce", "epo", "margin"] = "auto"
    learning_rate: float | None = Field(default=None, gt=0)  # None: all RATES with auto, else the source's
    kl: float | None = Field(default=None, ge=0)  # None: all KL_WEIGHTS with auto, else 0
    tau: float = Field(default=0.1, ge=0)  # nats
    beta: float = Field(default=0.1, gt=0)
    batch: int = Field(default=16, ge=1)
    epochs: int = Field(default=1, ge=1)
    debias: bool = False
    routes: int = Field(default=32, ge=1)
    pool: int = Field(default=32, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    served_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_memory: int = Field(default=2 * 10**9, ge=1)  # bytes
    resume: bool = True

    @field_validator("max_memory", mode="before")
    @classmethod
    def _bytes(cls, value: object) -> object:
        return parse_bytes(value) if isinstance(value, str) else value

    @property
    def draw(self) -> DrawOptions:
        """How routes are drawn."""
        return DrawOptions(self.routes, self.pool, self.temperature)

    def candidates(self) -> list[Candidate]:
        """What is tried, in this order; the first is to leave the router as it is."""
        auto = self.objective == "auto"
        rates = (self.learning_rate,) if self.learning_rate else RATES if auto else RATES[-1:]
        weights = (self.kl,) if self.kl is not None else KL_WEIGHTS if auto else KL_WEIGHTS[:1]
        objectives = AUTO if self.objective == "auto" else (self.objective,)
        found = [Candidate(o, rate, kl) for o in objectives for rate in rates for kl in weights]
        return [Candidate("none"), *found]
