"""The result of a route analysis: what `analysis.json` holds, format cor-misrouted/1."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.routes import statistics
from cor_vllm.calibrate.routes.bootstrap import Interval, Means, document_sums, holm, resampled_means
from cor_vllm.calibrate.routes.groups import BINS, Group
from cor_vllm.calibrate.routes.utilities import Standard, Utilities
from cor_vllm.errors import cause

FILE = "analysis.json"


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Measure(_Table):
    """One measure of one group of tokens; None means that there are too few documents, or no token."""

    realised: float | None
    realised_interval: Interval | None
    realised_median: float | None
    null: float | None
    null_interval: Interval | None
    null_median: float | None
    excess: float | None
    excess_interval: Interval | None
    p: float | None
    p_holm: float | None = None  # only of the regret of the three groups by probability


class GroupTable(_Table):
    """A group of tokens; pairs of numbers are of realised and of null targets."""

    name: str
    low: float  # probability under the standard route
    high: float
    tokens: tuple[int, int]
    documents: tuple[int, int]
    share: tuple[float, float]  # of all scored tokens
    measures: dict[str, Measure]
    saturation: list[tuple[float | None, float | None]]  # the regret with `draws` draws


class ExpertTable(_Table):
    """Slots of one expert in the best routes, gained minus lost, as a share of all slots."""

    expert: int
    realised: float
    null: float


class LayerTable(_Table):
    """One MoE layer, or all jointly."""

    layer: int | None  # decoder layer number; None: jointly at all layers
    epsilon: float  # nats, below which two utilities are the same
    distinct: float  # mean number of different routes of a token, the standard one included
    groups: list[GroupTable]  # by probability; then, unless quotas chose the tokens, all and by decile
    experts: list[ExpertTable] | None  # None if joint

    @property
    def name(self) -> str:
        """In words."""
        return "all layers jointly" if self.layer is None else f"layer {self.layer}"


class ModelTable(_Table):
    """The model that was analysed."""

    name: str
    revision: str | None
    architecture: str
    num_experts: int
    top_k: int
    num_hidden_layers: int
    fingerprint: str
    dtype: str
    device: str


class TextTable(_Table):
    """The text that was analysed."""

    name: str
    sha256: str
    read: int  # positions that the model read
    scored: int  # tokens whose routes were compared
    documents: int


class Analysis(_Table):
    """All that an analysis found."""

    format: Literal["cor-misrouted/1"] = "cor-misrouted/1"
    options: dict[str, Any]
    model: ModelTable
    text: TextTable
    versions: dict[str, str]
    notes: list[str]
    draws: list[int]  # the numbers of draws of `saturation`
    layers: list[LayerTable]


def read_analysis(path: Path) -> Analysis:
    """Read `analysis.json`, or the one in a folder.

    Raises:
        CalibrationError: it cannot be read, or is something else.
    """
    file = path / FILE if path.is_dir() else path
    try:
        return Analysis.model_validate_json(file.read_bytes())
    except OSError as error:
        raise CalibrationError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except ValidationError as error:
        raise CalibrationError(f"{file}: not an analysis that can be read ({cause(error)})") from None


def layer_table(
    standard: Standard, utilities: Utilities, groups: Sequence[Group], experts: int, seed: int
) -> LayerTable:
    """All statistics of one layer.

    Args:
        standard: of the T tokens.
        utilities: of their routes.
        groups: a target in none of them does not count.
        experts: N.
        seed: of the resampling.
    """
    epsilon = statistics.rounding(standard, utilities)
    measures = statistics.token_measures(utilities, epsilon)
    document = standard.document.unique(return_inverse=True)[1]
    sums = [document_sums(values, group.mask, document) for group in groups for values in measures.values()]
    means = iter(resampled_means(sums, seed))
    curve = statistics.saturation(utilities)
    tables = []
    for group in groups:
        found = {name: _measure(values, group.mask, next(means)) for name, values in measures.items()}
        tables.append(_group_table(group, found, curve, document))
    counted = torch.stack([group.mask for group in groups]).any(dim=0)
    return LayerTable(
        layer=utilities.layer,
        epsilon=epsilon,
        distinct=1 + statistics.alternatives(utilities).sum(dim=1).double().mean().item(),
        groups=tables,
        experts=_experts(utilities, counted, experts, epsilon),
    )


def _measure(values: torch.Tensor, mask: torch.Tensor, means: Means) -> Measure:
    return Measure(
        **asdict(means),
        realised_median=_median(values[:, :1][mask[:, :1]]),
        null_median=_median(values[:, 1:][mask[:, 1:]]),
    )


def _median(values: torch.Tensor) -> float | None:
    defined = values[~values.isnan()]
    return float(np.median(defined.numpy())) if len(defined) else None


def _mean(values: torch.Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def _group_table(
    group: Group, measures: dict[str, Measure], curve: torch.Tensor, document: torch.Tensor
) -> GroupTable:
    masks = group.mask[:, :1], group.mask[:, 1:]
    points = [(_mean(at[:, :1][masks[0]]), _mean(at[:, 1:][masks[1]])) for at in curve.unbind(dim=1)]
    return GroupTable(
        name=group.name,
        low=group.low,
        high=group.high,
        tokens=(int(masks[0].sum()), int(masks[1].sum())),
        documents=(_documents(masks[0], document), _documents(masks[1], document)),
        share=group.share,
        measures=measures,
        saturation=points,
    )


def _documents(mask: torch.Tensor, document: torch.Tensor) -> int:
    return len(document[mask.any(dim=1)].unique())


def _experts(
    utilities: Utilities, counted: torch.Tensor, experts: int, epsilon: float
) -> list[ExpertTable] | None:
    changes = statistics.slot_changes(utilities, counted, experts, epsilon)
    if changes is None:
        return None
    pairs = zip(*(side.tolist() for side in changes), strict=True)
    return [ExpertTable(expert=e, realised=realised, null=null) for e, (realised, null) in enumerate(pairs)]


def corrected(layers: Sequence[LayerTable]) -> list[LayerTable]:
    """The same layers with the p-values of the excess regret corrected over layers and groups of BINS."""
    cells = [(m, g) for m in range(len(layers)) for g in range(len(BINS))]
    p_values = holm([layers[m].groups[g].measures["regret"].p for m, g in cells])
    found = dict(zip(cells, p_values, strict=True))
    return [
        layer.model_copy(
            update={"groups": [_with_holm(group, found.get((m, g))) for g, group in enumerate(layer.groups)]}
        )
        for m, layer in enumerate(layers)
    ]


def _with_holm(group: GroupTable, p: float | None) -> GroupTable:
    regret = group.measures["regret"].model_copy(update={"p_holm": p})
    return group.model_copy(update={"measures": group.measures | {"regret": regret}})
