"""The JSON half of a scores file: what was calibrated, how, and what its own check said."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from cor_vllm.modes import ModeName

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Sketch = Annotated[list[float], Field(min_length=64, max_length=64)]
HARM_ERRORS = 2  # standard errors beyond which a file's own check says that it hurts


class Section(BaseModel):
    """One JSON object in the `config` of a file."""

    # Unknown keys are kept, so that a later minor addition survives a read and write by this version.
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, validate_by_name=True)


class TensorInfo(Section):
    """A router's tensor: how it is stored, and SHA-256 of its values and of those after each usual cast."""

    dtype: str
    sha256: list[Sha256] = Field(min_length=1)


class RouterInfo(Section):
    """What a copy of a router is known by (copies.py); sketches are random projections to 64 numbers."""

    layer: int = Field(ge=0)
    tensors: dict[str, TensorInfo]
    sketch: Sketch  # of the weight
    input_sketch: Sketch | None = None  # of the weight times that of the norm before the router


class ModelInfo(Section):
    """The model that the scores belong to; the server compares every field but name and revision."""

    name: str
    revision: str | None = None
    architecture: str
    num_experts: int = Field(ge=1, le=65536)
    top_k: int = Field(ge=1, le=65536)
    num_hidden_layers: int = Field(ge=1, le=65536)
    fingerprint: Sha256  # of the routers' bytes
    routers: list[RouterInfo] | None = None  # by layer; files of the first version have none
    # Of the router overlay that was in force during the measurement (overlay.RouterOverlay.fingerprint).
    router_overlay: Sha256 | None = Field(default=None, exclude_if=lambda value: value is None)


class _Optional(Section):
    """A section with keys that only some files have: a field that was never set is not written."""

    @model_serializer(mode="wrap")
    def _as_set(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        unset = fields.keys() - self.model_fields_set
        names = unset | {fields[name].alias for name in unset}
        return {name: value for name, value in write(self).items() if name not in names}


class MarginalInfo(Section):
    """What one expert less and one more does to a layer: mean loss change and its standard error, nats."""

    fewer: tuple[float, float] | None
    more: tuple[float, float] | None


class CalibrationInfo(_Optional):
    """Where the numbers come from: text, strata, the options of `cor-vllm calibrate`, and their precision."""

    corpus: str
    corpus_sha256: Sha256
    seed: int
    num_positions: int = Field(ge=1)
    num_hard: int = Field(ge=0)
    num_easy: int = Field(ge=0)
    tau_high: float  # nats
    tau_low: float  # nats
    # The options, by their names on the command line; files are named without their folders.
    answers: str | None = None
    token_ids: str | None = None
    positions: str | None = None
    cor_router: str | None = None
    num_tokens: int | None = None
    seq_len: int | None = None
    hard_percentile: float | None = None
    easy_percentile: float | None = None
    delta: float | None = None
    epsilon: float | None = None  # nats
    ablation: str | None = None
    scope: str | None = None
    perturb_scope: str | None = None
    perturb_target: str | None = None
    algorithm: str | None = None
    intensity: str | None = None
    budget: str | None = None
    k_min: int | None = None
    k_max: int | None = None
    heldout_tokens: int | None = None
    tune: bool | None = None
    shrink: bool | None = None
    dtype: str | None = None
    device: str | None = None
    max_memory: int | None = None  # bytes
    # What the numbers are worth.
    heldout_corpus: str | None = None
    mean_loss: float | None = None  # nats, of all positions
    sensitivity_hard_sem: list[float] | None = None  # [M] standard errors on hard positions, nats
    sensitivity_easy_sem: list[float] | None = None  # [M] standard errors on easy positions, nats
    rki_interval: list[tuple[float, float]] | None = None  # [M] 95 % intervals of R_l
    cei_split_half: float | None = None  # correlation of CEI from two halves of the hard positions
    cei_split_half_rank: float | None = None  # the same of ranks within layers
    marginal: list[MarginalInfo] | None = None  # [M], of `--intensity marginal`


class BudgetInfo(Section):
    """How k_l was allocated; `sum` misses `total` only under the paper's rounding."""

    rule: Literal["exact", "paper"]
    k_min: int = Field(ge=1)
    k_max: int = Field(ge=1)
    total: int = Field(ge=1)
    sum: int = Field(ge=1)


class LossStat(Section):
    """Mean loss in nats; difference to stock routing on the same positions with its paired standard error."""

    mean: float
    difference: float
    sem: float = Field(ge=0)


class ModeLoss(Section):
    all: LossStat
    hard: LossStat


class Trial(Section):
    """One setting that `--tune` tried: its loss minus stock routing's on the tuning half, nats."""

    mode: str
    lambda_: float = Field(alias="lambda")
    difference: float
    sem: float = Field(ge=0)


class TuningInfo(Section):
    """What `--tune` tried, and on how many positions."""

    positions: int
    trials: list[Trial]


class AlternativeInfo(Section):
    """A setting one flag away: its loss minus that of the file's own setting, paired, nats."""

    flags: str
    difference: float
    sem: float = Field(ge=0)


class HeldoutInfo(_Optional):
    """Loss on positions that calibration did not use, by routing mode (`stock` is the untouched model)."""

    positions: int = Field(ge=1)
    hard_positions: int = Field(ge=0)
    modes: dict[str, ModeLoss]
    lambda_: float | None = Field(default=None, alias="lambda")  # of the modes that have one
    tuning: TuningInfo | None = None
    alternatives: list[AlternativeInfo] = []

    def harm(self, mode: str) -> str | None:
        """One line if `mode` raised the loss by more than HARM_ERRORS standard errors, else None."""
        loss = self.modes.get(mode)
        if loss is None or loss.all.difference <= HARM_ERRORS * loss.all.sem:
            return None
        return (
            f"held-out check: mode {mode} is worse than stock routing by {loss.all.difference:.4f} ± "
            f"{loss.all.sem:.4f} nats; try --tune, or serve with --cor-mode off"
        )


class ServingInfo(Section):
    """What the server uses unless a flag says otherwise."""

    lambda_: float = Field(default=0.1, ge=0, alias="lambda")
    mode: ModeName = "full"


class ScoresConfig(Section):
    """The `config` object of a scores file (docs/reference/scores-file.md)."""

    model: ModelInfo
    calibration: CalibrationInfo
    budget: BudgetInfo
    heldout: HeldoutInfo | None = None
    serving: ServingInfo = ServingInfo()
    versions: dict[str, str]
