"""Is a row what it is called? What an engine or a server says of its routing, against the row's condition."""

import math
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cor_vllm.errors import invalid
from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.live.state import State
from cor_vllm.modes import MODES
from cor_vllm.scores import Scores
from cor_vllm.serve.config import RoutingOptions, plan

CLOSE = 1e-6  # of two λ, relative: they went through text


@dataclass(frozen=True)
class Claim:
    """What a row says of its routing."""

    options: dict[str, Any] | None  # `additional_config["cor"]` less `scores`; None: no plugin
    scores: Scores | None = None  # None: any file, with its own λ if `options` have none
    sha256: str | None = None  # of the scores file
    router: str | None = None  # fingerprint of the router that replaces one of the model's; None: none


def state_of(answer: Any, where: str) -> State | None:
    """What `GET /v1/cor` answered; None if the server has no such endpoint.

    Raises:
        EvaluationError: it is not an answer of this plugin.
    """
    if answer is None:
        return None
    try:
        return State.model_validate(answer)
    except ValidationError as error:
        path, message, _ = invalid(error)
        raise EvaluationError(
            f"{where}: GET /v1/cor answers what this version of cor-vllm cannot read "
            f"({'.'.join(path) or 'all of it'}: {message}); run the same version of cor-vllm there and here"
        ) from None


def described(state: State | None) -> str:
    """How a server routes, in one line."""
    if state is None:
        return "no counterfactual routing"
    parts = [] if state.scores_sha256 is None else _described_scores(state, state.scores_sha256)
    if state.router is not None:
        off = "" if state.router.on else ", off"
        parts.append(f"router {state.router.fingerprint[:12]} in layer {state.router.layer}{off}")
    return ", ".join([*parts, *(["admin"] if state.admin else [])])


def _described_scores(state: State, sha256: str) -> list[str]:
    parts = [f"mode {state.mode}"]
    if state.static_k is not None:
        parts = [f"static k {state.static_k}"]
    if state.lambda_ is not None:
        parts.append(f"λ {state.lambda_:g}")
    if state.swap_rate is not None:
        parts.append(f"swap rate {state.swap_rate:g}")
    if state.weights != "router":
        parts.append(f"weights {state.weights}")
    if state.mode in MODES and MODES[state.mode].random:
        parts.append(f"seed {state.seed}")
    return [*parts, f"Σ k_l {state.budget}", f"scores {sha256[:12]}"]


def check(where: str, name: str, claim: Claim, state: State | None) -> None:
    """Compare what was said with what the row claims.

    Args:
        where: the engine or server, for the message.
        name: the row's.
        claim: what it stands for.
        state: what was said; None: no counterfactual routing.

    Raises:
        EvaluationError: they differ.
    """
    if found := differences(claim, state):
        raise EvaluationError(
            f"{where} is not what the row {name!r} is called: {'; '.join(found)}. It says of itself: "
            f"{described(state)}. Give the row the name that fits, or start the server with the flags that "
            "the row stands for"
        )


def differences(claim: Claim, state: State | None) -> list[str]:
    """What a server says otherwise than the row claims; empty if they agree."""
    if claim.options is None and claim.router is None:
        return [] if state is None else ["the row stands for a server without the plugin's routing"]
    if state is None:
        what = "another router" if claim.options is None else "counterfactual routing"
        return [f"the row stands for {what}, which the server has not"]
    found = _router(claim, state)
    if claim.options is None:
        alone = state.scores_sha256 is None
        return found + ([] if alone else ["the row stands for a router alone, and the server has scores"])
    return found + _routing(claim, claim.options, state)


def _router(claim: Claim, state: State) -> list[str]:
    """What is in force in place of the model's own router otherwise than the row claims."""
    theirs = state.router.fingerprint if state.router is not None and state.router.on else None
    if claim.router == theirs:
        return []
    ours, other = (name[:12] if name else "the model's own" for name in (claim.router, theirs))
    return [f"the router is {other}, not {ours}"]


def _routing(claim: Claim, options: dict[str, Any], state: State) -> list[str]:
    """What a server with scores says otherwise than the row claims."""
    if state.scores_sha256 is None:
        return ["the row stands for counterfactual routing, which the server has not"]
    config = RoutingOptions.of(options)
    if claim.scores is not None:
        config = config.resolved(claim.scores.config.serving)
    found = [
        f"{name} is {theirs}, not {ours}"
        for name, ours, theirs in _wanted(config, claim, state)
        if not _same(ours, theirs)
    ]
    return found or ([] if claim.scores is None else _layers(config, claim.scores, state))


def _wanted(config: RoutingOptions, claim: Claim, state: State) -> list[tuple[str, object, object]]:
    """(what, the claim's value, the state's), of everything that the claim fixes."""
    rows: list[tuple[str, object, object]] = [
        ("the mode", "static_k" if config.static_k is not None else config.mode, state.mode),
        ("static k", config.static_k, state.static_k),
        ("what weighs the experts", config.weights, state.weights),
    ]
    if config.lambda_ is not None or config.swap_rate is not None:
        rows.append(("λ", config.lambda_, state.lambda_))
        rows.append(("the swap rate", config.swap_rate, state.swap_rate))
    elif config.static_k is None:
        rows.append(("the swap rate", None, state.swap_rate))
    if config.mode is not None and MODES[config.mode].random:
        rows.append(("the seed", config.seed, state.seed))
    if claim.sha256 is not None:
        rows.append(("the scores file", claim.sha256[:12], (state.scores_sha256 or "none")[:12]))
    return rows


def _same(ours: object, theirs: object) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=CLOSE)
    return ours == theirs


def _layers(config: RoutingOptions, scores: Scores, state: State) -> list[str]:
    """The first MoE layer whose k or λ is not the file's."""
    planned = plan(config, scores)
    said = {layer.layer: layer for layer in state.layers}
    if planned.keys() != said.keys():
        return [f"it routes the layers {sorted(said)}, not {sorted(planned)}"]
    for index, layer in planned.items():
        if layer.top_k != said[index].k:
            return [f"k of layer {index} is {said[index].k}, not {layer.top_k}"]
        if not _same(layer.lambda_, said[index].lambda_):
            return [f"λ of layer {index} is {said[index].lambda_:g}, not {layer.lambda_:g}"]
    return []
