"""Is every MoE layer routed as the scores file says? Compared with numbers computed here from the file.

Nothing of the routing step is used: probabilities, groups and selection are numpy in float64.

Source: docs/reference/method.md, "Selection while serving" and "Modes".
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cor_vllm.kernels.reference import random_scores
from cor_vllm.scores import Scores
from cor_vllm.serve.config import CorConfig, plan

if TYPE_CHECKING:
    from cor_vllm.verify.probe import LayerRecord

# The modes by the score that their experts are selected by. A mode that is missing here is never verified.
STATIC_K = "static_k"
OWN_SCORE, CAUSAL_SCORE, DRAWN_SCORE = (STATIC_K, "off", "layer"), ("expert", "full"), ("random",)
K_OF_THE_FILE = ("layer", "full", "random")
SCORE_GAP = 4e-6  # scores this close may change places between float32 and float64
WEIGHT_ERROR = 1e-4


@dataclasses.dataclass(frozen=True)
class LayerVerdict:
    """What was found at one MoE layer of one worker; `problems` is empty if all is as the file says."""

    worker: int
    layer: int
    name: str
    kernel: str
    modular: bool
    router: str
    k: int
    expected_k: int
    tokens: int
    as_expected: float  # share of tokens whose experts are the expected ones
    weights_error: float  # largest difference from the expected weights
    changed: float  # share of expert slots that the model's own score would not fill
    lambda_0: float  # share of tokens where our routing step with λ = 0 selects as vLLM's own router does
    problems: tuple[str, ...]


def judge(
    records: list["LayerRecord"], config: CorConfig, scores: Scores, worker: int = 0
) -> list[LayerVerdict]:
    """Compare what a worker recorded with what the file says.

    Args:
        records: its layers, from probe.recording or probe.ask_routers.
        config: the serving options.
        scores: the file that they name.
        worker: its rank.
    """
    return [_judge_layer(record, config, scores, worker) for record in records]


def _judge_layer(record: "LayerRecord", config: CorConfig, scores: Scores, worker: int) -> LayerVerdict:
    mode, expected_k = _mode(config, scores), _expected_k(record, config, scores)
    problems = []
    logits = _real_logits(record)
    if logits is not None and (fault := fault_of(logits, record.different_tokens)):
        problems.append(fault)
    if expected_k is None:
        problems.append("a MoE layer that the scores file does not have")
    known = mode in (*OWN_SCORE, *CAUSAL_SCORE, *DRAWN_SCORE)
    if not known:
        problems.append(f"the verifier does not know what mode {mode!r} means")
    if record.router != "CorRouter":
        problems.append(f"routed by {record.router}, not by counterfactual routing")
    if not record.modular:
        problems.append("the expert kernel routes inside itself")
    if record.router_logits is None:
        problems.append("its router was never asked")
    if record.topk_ids is None:
        problems.append("its expert kernel was never given expert ids")
    if expected_k is not None and record.top_k != expected_k:
        problems.append(f"k is {record.top_k}, the file says {expected_k}")
    shares = {"as_expected": 0.0, "weights_error": float("inf"), "changed": 0.0, "lambda_0": 0.0}
    tokens = 0
    ran = logits is not None and bool(logits.isfinite().all()) and record.topk_ids is not None
    if known and expected_k is not None and ran:
        assert record.topk_ids is not None, "it ran"
        tokens = len(record.topk_ids)
        shares, found = _compare(record, config, scores, expected_k)
        problems += found
    return LayerVerdict(
        worker=worker, layer=record.layer_index, name=record.name, kernel=record.kernel,
        modular=record.modular, router=record.router, k=record.top_k, expected_k=expected_k or 0,
        tokens=tokens, problems=tuple(problems), **shares,
    )  # fmt: skip


def _real_logits(record: "LayerRecord") -> torch.Tensor | None:
    """The logits without the rows that fill up a CUDA graph, which have no experts."""
    logits, ids = record.router_logits, record.topk_ids
    return logits if logits is None or ids is None else logits[ids[:, 0] >= 0]


def fault_of(router_logits: torch.Tensor, different_tokens: bool) -> str | None:
    """What is wrong with a router, whatever is made of its logits; None if nothing is.

    Args:
        router_logits: [T, N], in the dtype that the model computes them in.
        different_tokens: the rows are of different tokens. A run with dummy tokens, which are all the same,
            says nothing about a router.
    """
    logits = router_logits.double().numpy()
    if not np.isfinite(logits).all():
        return "its router's logits are not finite"
    if not different_tokens or len(logits) < 2 or logits.shape[1] < 2:
        return None
    # Sums in another order may differ in the last place.
    rounding = torch.finfo(router_logits.dtype).eps * np.abs(logits).max()
    what = "its router's logits {}, so it chooses nothing: its weights were not loaded, or are all the same"
    if np.ptp(logits, axis=1).max() <= rounding:
        return what.format("are the same for all experts")
    if np.ptp(logits, axis=0).max() <= rounding:
        return what.format(f"are the same for all of {len(logits)} tokens")
    return None


def _compare(
    record: "LayerRecord", config: CorConfig, scores: Scores, k: int
) -> tuple[dict[str, float], list[str]]:
    assert record.topk_ids is not None and record.topk_weights is not None, "checked by the caller"
    probs = _probabilities(record)
    own_bias = record.scoring.correction_bias
    own = probs + (0 if own_bias is None else own_bias.double().numpy())
    wanted = _wanted_scores(record, config, scores, own)
    ids, weights = record.topk_ids.long().numpy(), record.topk_weights.double().numpy()
    real = ids[:, 0] >= 0  # rows that fill up a CUDA graph have no experts
    ok = _selects(ids, wanted, record, k, rounded=record.decided_by_vllm)[real]
    problems = []
    if not ok.all():
        problems.append(f"{(~ok).sum()} of {ok.size} tokens have other experts than the file says")
    fused = config.weights == "fused"
    if record.decided_by_vllm and record.stock_ids is not None and record.stock_weights is not None:
        # vLLM computed these, and may have rounded them; what it computes is compared below.
        error = _difference(ids, weights, record.stock_ids, record.stock_weights, probs.shape[1])
    else:
        error = _weights_error(
            ids, weights, wanted if fused else probs, record, fused or record.scoring.renormalize
        )
    worst = float(error[real].max(initial=0.0))
    if not worst <= WEIGHT_ERROR:
        problems.append(f"weights differ from the expected ones by up to {worst:.2g}")
    lambda_0 = _like_vllm(record, probs, own, k)
    if not lambda_0.all():
        problems.append(f"with λ = 0 it routes otherwise than vLLM for {(~lambda_0).sum()} tokens")
    changed = ~_among_best(ids, own, record, k, rounded=True)[real]
    shares = {
        "as_expected": float(ok.mean()) if ok.size else 0.0,
        "weights_error": worst,
        "changed": float(changed.mean()) if changed.size else 0.0,
        "lambda_0": float(lambda_0.mean()),
    }
    return shares, problems


def _like_vllm(record: "LayerRecord", probs: np.ndarray, own: np.ndarray, k: int) -> np.ndarray:
    """[T] bool: with λ = 0 our step selects, and our formula weighs, as vLLM's own router does.

    This is what holds our reading of the model (scoring, groups, renormalisation, scale) against vLLM's. Its
    weights are those that it computes in float32, so that no rounding of another dtype has to be tolerated.
    """
    if record.stock_ids is None or record.exact_ids is None or record.exact_weights is None:
        return np.ones(len(probs), dtype=bool)  # not our router, which is a problem of its own
    assert record.unbiased_ids is not None, "recorded together"
    exact, weights = record.exact_ids.long().numpy(), record.exact_weights.double().numpy()
    return (
        _selects(record.stock_ids.long().numpy(), own, record, k, rounded=True)
        & _selects(exact, own, record, k)
        & _selects(record.unbiased_ids.long().numpy(), own, record, k)
        & (_weights_error(exact, weights, probs, record, record.scoring.renormalize) <= WEIGHT_ERROR)
    )


def selects_best(record: "LayerRecord") -> np.ndarray:
    """[tokens] bool: are a token's experts those of the model's own score? Rows that stand for none are left
    out.

    Args:
        record: of a layer that the model's own score routes.
    """
    assert record.topk_ids is not None, "checked by the caller"
    own, own_bias = _probabilities(record), record.scoring.correction_bias
    own = own if own_bias is None else own + own_bias.double().numpy()
    ids = record.topk_ids.long().numpy()
    right: np.ndarray = _selects(ids, own, record, record.top_k, rounded=True)[ids[:, 0] >= 0]
    return right


def _probabilities(record: "LayerRecord") -> np.ndarray:
    assert record.router_logits is not None, "checked by the caller"
    logits = record.router_logits.double().numpy()
    if record.scoring.scoring_func == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _wanted_scores(record: "LayerRecord", config: CorConfig, scores: Scores, own: np.ndarray) -> np.ndarray:
    """[T, N] what the experts have to be selected by; computed here, without modes.py."""
    mode = _mode(config, scores)
    if mode in OWN_SCORE:
        return own
    if mode in DRAWN_SCORE:
        assert record.router_logits is not None, "checked by the caller"
        return random_scores(record.router_logits, config.seed + record.layer_index).double().numpy()
    if config.swap_rate is not None:
        bias = plan(config, scores)[record.layer_index].bias
        return own if bias is None else own + bias.double().numpy()
    lambda_ = scores.config.serving.lambda_ if config.lambda_ is None else config.lambda_
    row = scores.layer_index.tolist().index(record.layer_index)
    return own + lambda_ * scores.cei[row].double().numpy()


def _mode(config: CorConfig, scores: Scores) -> str:
    return STATIC_K if config.static_k is not None else config.mode or scores.config.serving.mode


def _expected_k(record: "LayerRecord", config: CorConfig, scores: Scores) -> int | None:
    """How many experts the layer has to select; None if the file does not have the layer."""
    layers = scores.layer_index.tolist()
    if record.layer_index not in layers:
        return None
    if config.static_k is not None:
        return config.static_k
    row = layers.index(record.layer_index)
    return int(scores.k[row]) if _mode(config, scores) in K_OF_THE_FILE else scores.config.model.top_k


def _with_groups(scores: np.ndarray, record: "LayerRecord") -> np.ndarray:
    """The scores, −inf for experts whose group was not chosen."""
    groups, kept = record.scoring.num_expert_group, record.scoring.topk_group
    if kept >= groups:
        return scores
    by_group = scores.reshape(len(scores), groups, -1)
    sums = np.sort(by_group, axis=2)[:, :, -2:].sum(axis=2)
    dropped = np.ones(sums.shape, dtype=bool)
    np.put_along_axis(dropped, _top(sums, kept), False, axis=1)
    return np.where(dropped[:, :, None], -np.inf, by_group).reshape(scores.shape)


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """[T, k] the highest, ties to the lowest id."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def _selects(
    ids: np.ndarray, scores: np.ndarray, record: "LayerRecord", k: int, rounded: bool = False
) -> np.ndarray:
    """[T] bool: are these the k best experts, each once? `rounded` as in _among_best."""
    if ids.shape[1] != k:
        return np.zeros(len(ids), dtype=bool)
    distinct = np.array([len(set(row)) == k for row in ids.tolist()])
    valid = (ids >= 0) & (ids < scores.shape[1])
    return distinct & (valid & _among_best(ids, scores, record, k, rounded)).all(axis=1)


def _among_best(
    ids: np.ndarray, scores: np.ndarray, record: "LayerRecord", k: int, rounded: bool
) -> np.ndarray:
    """[T, len of a row of ids] bool: is this expert one of the k best? Scores as good as tied may swap.

    With `rounded` the scores are compared as vLLM may see them, in the dtype of the logits: two probabilities
    that are one number there are tied.
    """
    allowed = _with_groups(scores, record)
    if rounded:
        assert record.router_logits is not None, "checked by the caller"
        allowed = torch.from_numpy(allowed).to(record.router_logits.dtype).double().numpy()
    lowest = np.take_along_axis(allowed, _top(allowed, k)[:, -1:], axis=1)
    chosen = np.take_along_axis(allowed, np.clip(ids, 0, scores.shape[1] - 1), axis=1)
    return chosen >= lowest - SCORE_GAP


def _weights_error(
    ids: np.ndarray, weights: np.ndarray, by: np.ndarray, record: "LayerRecord", renormalize: bool
) -> np.ndarray:
    """[T] largest difference of a token's weights from what its experts should have."""
    expected = np.take_along_axis(by, np.clip(ids, 0, by.shape[1] - 1), axis=1)
    if renormalize:
        expected = expected / expected.sum(axis=1, keepdims=True)
    return np.abs(weights - expected * record.scoring.scale).max(axis=1)


def _difference(
    ids: np.ndarray, weights: np.ndarray, ids_2: torch.Tensor, weights_2: torch.Tensor, experts: int
) -> np.ndarray:
    """[T] largest difference between two sets of weighed experts, in whatever order."""
    by_expert = np.zeros((2, len(ids), experts))
    others = ids_2.long().numpy(), weights_2.double().numpy()
    for row, (chosen, of_them) in zip(by_expert, ((ids, weights), others), strict=True):
        np.put_along_axis(row, np.clip(chosen, 0, experts - 1), of_them, axis=1)
    return np.abs(by_expert[0] - by_expert[1]).max(axis=1)


def first_problem(verdicts: list[LayerVerdict]) -> str | None:
    """One line on the first layer that is not routed as the file says."""
    for verdict in verdicts:
        if verdict.problems:
            return f"{verdict.name}: {verdict.problems[0]}"
    return None


def as_rows(verdicts: list[LayerVerdict]) -> list[dict[str, Any]]:
    """For JSON."""
    return [dataclasses.asdict(verdict) for verdict in verdicts]
