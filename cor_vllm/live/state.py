"""What `/v1/cor` answers and accepts. The answer is put together from what every worker says of itself."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cor_vllm.errors import CorError, invalid, one_line
from cor_vllm.modes import ModeName, has_lambda


class ChangeError(CorError):
    """A body that is not a Change: one line with the field and what it must be."""


class StateError(CorError):
    """Workers that do not route alike."""


class Change(BaseModel):
    """The body of POST /v1/cor: what it names changes, the rest stays."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    lambda_: float | None = Field(default=None, alias="lambda", ge=0)
    mode: ModeName | None = None
    router: bool | None = None  # whether the router of the router file is in force

    @model_validator(mode="after")
    def _means_something(self) -> "Change":
        if any(getattr(self, field) is None for field in self.model_fields_set):
            raise ValueError("null changes nothing: leave the field out")
        if not self.model_fields_set:
            raise ValueError('give "lambda", "mode" or "router"')
        if self.lambda_ is not None and self.mode is not None and not has_lambda(self.mode):
            raise ValueError(f"mode {self.mode!r} has no λ: leave out one of them")
        return self

    @classmethod
    def of(cls, body: bytes) -> "Change":
        """Validate a request's body; ChangeError with one line if it is wrong."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            where, message, _ = invalid(error)
            # Field names are the client's own and may be long.
            text = one_line(f"{'.'.join(where) or 'body'}: {message}", limit=300)
            raise ChangeError(f'{text}; send for instance {{"lambda": 0.1}} or {{"mode": "off"}}') from None


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, validate_by_name=True, serialize_by_alias=True)


class Layer(_Answer):
    """One MoE layer as its worker routes it."""

    layer: int  # decoder layer number
    name: str
    router: str  # class
    kernel: str  # class that computes the experts
    k: int  # experts per token
    lambda_: float = Field(alias="lambda")
    biased: bool  # whether λ·CEI is anything but zeros here


class Worker(_Answer):
    """One worker process and the MoE layers that it routes by counterfactual routing."""

    engine: int  # data-parallel
    rank: int  # within the engine
    hooked_layers: int


class Router(_Answer):
    """The router of a router file, and whether it is in force."""

    sha256: str  # of the file
    fingerprint: str  # of its layer and weight (overlay.RouterOverlay.fingerprint)
    layer: int  # decoder layer number
    on: bool
    drift: float  # how far it is from the model's own, relative
    objective: str  # of its training
    warnings: list[str]  # what its own held-out check says against it


class State(_Answer):
    """How this server routes; `mode` is "static_k" if that option sets the routing.

    What depends on a scores file is None without one, and there are no layers then.
    """

    version: str
    scores_sha256: str | None
    fingerprint: str  # of the model's routers, its own
    router: Router | None  # None without a router file
    mode: str | None
    lambda_: float | None = Field(alias="lambda")  # None: none, or one per layer (swap_rate)
    swap_rate: float | None
    static_k: int | None
    weights: str | None
    seed: int | None
    admin: bool
    observe: bool
    model_top_k: int | None
    budget: int | None  # Σ k_l
    model_budget: int | None  # MoE layers times the model's own top_k
    warnings: list[str]  # what is in force and hardly meant, as in the log of the start
    layers: list[Layer]
    workers: list[Worker]


def combine(engines: list[list[dict[str, Any]]]) -> State:
    """One State of all workers' own (control.worker_status), by engine and rank.

    Raises:
        StateError: they differ in an option, in a layer that they share, or in the router of a router file.
    """
    first = engines[0][0]
    layers: dict[int, dict[str, Any]] = {}
    routers: list[dict[str, Any]] = []
    workers = []
    for engine, statuses in enumerate(engines):
        for status in statuses:
            workers.append(Worker(engine=engine, rank=status["rank"], hooked_layers=len(status["layers"])))
            alike = status["options"] == first["options"]
            for layer in status["layers"]:
                alike &= layers.setdefault(layer["layer"], layer) == layer
            if status["router"] is not None:  # on a pipeline stage that has its layer
                routers.append(status["router"])
                alike &= status["router"] == routers[0]
            if not alike:
                raise StateError(
                    f"worker {status['rank']} of engine {engine} routes otherwise than the first: two "
                    "changes at once? Send yours again"
                )
    return State.model_validate(
        {
            **_of_scores(first, layers),
            "version": first["version"],
            "fingerprint": first["fingerprint"],
            "router": routers[0] if routers else None,
            "admin": first["options"]["admin"],
            "observe": first["options"]["observe"],
            "warnings": first["warnings"],
            "layers": [layers[index] for index in sorted(layers)],
            "workers": workers,
        }
    )


def _of_scores(first: dict[str, Any], layers: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The fields of a State that depend on a scores file, from a worker's status and all layers."""
    options = first["options"]
    if options["sha256"] is None:
        fields = ("scores_sha256", "mode", "lambda", "swap_rate", "static_k", "weights", "seed",
                  "model_top_k", "budget", "model_budget")  # fmt: skip
        return dict.fromkeys(fields)
    mode = options["mode"] or "static_k"
    return {
        "scores_sha256": options["sha256"],
        "mode": mode,
        "lambda": options["lambda"] if has_lambda(mode) else None,
        "swap_rate": options["swap_rate"] if has_lambda(mode) else None,
        "static_k": options["static_k"],
        "weights": options["weights"],
        "seed": options["seed"],
        "model_top_k": first["model_top_k"],
        "budget": sum(layer["k"] for layer in layers.values()),
        "model_budget": len(layers) * first["model_top_k"],
    }
