"""Options that are not what they look like are refused, and what is hardly meant is said."""

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

from cor_vllm import scores as scores_file
from cor_vllm.scores import Scores, ScoresError
from cor_vllm.serve.config import ConfigError, CorConfig, doubts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda": True}, "cor.lambda: Input should be a valid number, got True"),
        ({"lambda": "0.1"}, "cor.lambda: Input should be a valid number, got '0.1'"),
        ({"lambda": -0.1}, "cor.lambda: Input should be greater than or equal to 0, got -0.1"),
        ({"lambda": math.nan}, "cor.lambda: Input should be a finite number, got nan"),
        ({"lambda": math.inf}, "cor.lambda: Input should be a finite number, got inf"),
        ({"lambda": [0.1]}, "cor.lambda: Input should be a valid number"),
        ({"lambda_": True}, "cor.lambda"),
        ({"swap_rate": True}, "cor.swap_rate: Input should be a valid number, got True"),
        ({"swap_rate": "0.1"}, "cor.swap_rate: Input should be a valid number"),
        ({"swap_rate": math.nan}, "cor.swap_rate: Input should be a finite number"),
        ({"swap_rate": 0}, "cor.swap_rate: Input should be greater than 0"),
        ({"swap_rate": 1.5}, "cor.swap_rate: Input should be less than or equal to 1"),
        ({"static_k": 3.0}, "cor.static_k: Input should be a valid integer, got 3.0"),
        ({"static_k": True}, "cor.static_k: Input should be a valid integer, got True"),
        ({"static_k": "3"}, "cor.static_k: Input should be a valid integer"),
        ({"static_k": 0}, "cor.static_k: Input should be greater than or equal to 1"),
        ({"seed": True}, "cor.seed: Input should be a valid integer"),
        ({"seed": 1.0}, "cor.seed: Input should be a valid integer"),
        ({"seed": -1}, "cor.seed: Input should be greater than or equal to 0"),
        ({"admin": 1}, "cor.admin: Input should be a valid boolean"),
        ({"observe": "yes"}, "cor.observe: Input should be a valid boolean"),
        ({"mode": "Full"}, "cor.mode: Input should be 'full', 'layer'"),
        ({"weights": None}, "cor.weights: Input should be 'router' or 'fused'"),
        ({"lamda": 0.1}, "cor.lamda: Extra inputs are not permitted"),
        ({"scores": ""}, "cor.scores: the path is empty: give that of a scores file"),
        ({"scores": ["s"]}, "cor.scores: Input should be a valid string, got ['s']"),
        ({"scores": b"s"}, "cor.scores: Input should be a valid string, got b's'"),
        ({"scores": None}, "cor.scores: Input should be a valid string, got None"),
    ],
)  # fmt: skip
def test_values_that_are_not_what_they_look_like(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CorConfig.of({"scores": "s", **options})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("options", ["s", ["s"], None, True, {}])
def test_options_that_are_none(options: object) -> None:
    with pytest.raises(ConfigError, match=r"^cor: .* must be an object with `scores`, the path"):
        CorConfig.of(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda": 0.1, "mode": "off"}, "cor: mode 'off' has no λ"),
        ({"lambda": 0.1}, "cor: lambda: only with scores, the path of a scores file"),
        ({"mode": "off", "seed": 1}, "cor: mode, seed: only with scores"),
        ({"static_k": 3}, "cor: static_k: only with scores"),
        ({"swap_rate": 0.1}, "cor: swap_rate: only with scores"),
        ({"weights": "fused"}, "cor: weights: only with scores"),
        ({"observe": True}, "cor: observe: only with scores"),
        ({"router": ""}, "cor.router: the path is empty: give that of a router file"),
        ({"router": None}, "cor.router: Input should be a valid string, got None"),
    ],
)
def test_a_router_file_alone_has_nothing_of_a_scores_file(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CorConfig.of({"router": "r", **options})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_router_file_alone_keeps_its_options_on_the_way_to_a_worker() -> None:
    config = CorConfig.of({"router": Path("r"), "admin": True})
    assert CorConfig.of(config.model_dump(by_alias=True, exclude_none=True)) == config


def with_router(**options: object) -> CorConfig:
    return CorConfig.of({"router": "r", "admin": True, **options})


def test_what_a_change_of_the_router_may_be() -> None:
    off = with_router().changed(None, None, False)
    assert not off.router_on and off.changed(None, None, True) == with_router()
    with pytest.raises(ConfigError, match="no scores file, so it has no λ and no mode"):
        with_router().changed(0.1, None)
    with pytest.raises(ConfigError, match="no router file: restart it with --cor-router"):
        CorConfig.of({"scores": "s", "mode": "full", "admin": True}).changed(None, None, False)
    with pytest.raises(ConfigError, match="without --cor-admin"):
        CorConfig.of({"router": "r"}).changed(None, None, False)


def test_scores_that_were_measured_under_a_router_are_not_used_without_it() -> None:
    both = with_router(scores="s", mode="full")
    with pytest.raises(ConfigError, match="not served without the other"):
        both.changed(None, None, False)
    stock = both.changed(None, "off", False)  # which uses nothing of the scores
    with pytest.raises(ConfigError, match="not served without the other"):
        stock.changed(None, "full")
    assert stock.changed(None, "full", True) == both
    with pytest.raises(ConfigError, match="not served without the other"):
        both.model_copy(update={"router_on": False}).check_together()


def test_what_python_and_json_may_write() -> None:
    assert CorConfig.of({"scores": Path("a/s")}).scores == "a/s"
    assert CorConfig.of({"scores": "s", "lambda": 1}).lambda_ == 1.0
    assert CorConfig.of({"scores": "s", "static_k": 3}).static_k == 3


def test_an_empty_path_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScoresError, match=r"^the path is empty"):
        scores_file.load("")


def resolved(scores: Scores, **options: object) -> CorConfig:
    return CorConfig.of({"scores": "s", **options}).resolved(scores.config.serving)


@pytest.mark.parametrize("lambda_", [0.2001, 1.0, 1.5, 4.0, 1000.0])
@pytest.mark.parametrize("mode", ["full", "expert"])
def test_a_lambda_beyond_the_stable_range(scores: Scores, lambda_: float, mode: str) -> None:
    """The shares by counting: a pair is settled where λ times its difference in CEI exceeds 1."""
    (line,) = doubts(resolved(scores, mode=mode, **{"lambda": lambda_}), scores)
    assert line.startswith(f"λ = {lambda_:g} is beyond the stable range, 0.05 to 0.2")
    settled = [
        [lambda_ * abs(a - b) > 1 for a, b in itertools.combinations(row, 2)]
        for row in scores.cei.double().tolist()
    ]
    layers, pairs = sum(map(any, settled)), [pair for row in settled for pair in row]
    assert (layers > 0) == (lambda_ > 1)
    if layers:
        assert f"in {layers} of 3 layers experts differ" in line
        assert f"the order of {sum(pairs) / len(pairs):.0%} of all pairs" in line
    else:
        assert "router" not in line


@pytest.mark.parametrize(
    "options",
    [{}, {"lambda": 0.2}, {"lambda": 0.01}, {"lambda": 0}, {"mode": "off"}, {"mode": "layer"},
     {"mode": "random"}, {"static_k": 2}],
)  # fmt: skip
def test_nothing_is_said_of_ordinary_options(scores: Scores, options: dict[str, object]) -> None:
    assert doubts(resolved(scores, **options), scores) == []


def test_a_large_lambda_of_the_file_is_said_too(scores: Scores) -> None:
    serving = scores.config.serving.model_copy(update={"lambda_": 3.0})
    scores = dataclasses.replace(scores, config=scores.config.model_copy(update={"serving": serving}))
    (line,) = doubts(resolved(scores), scores)
    assert line.startswith("λ = 3 is beyond")
    assert doubts(resolved(scores, mode="layer"), scores) == []


def test_a_swap_rate_that_no_measured_lambda_reaches(scores: Scores) -> None:
    rates = torch.tensor([[0.0, 0.0, 0.1, 0.2, 0.3], [0.0, 0.0, 0.1, 0.2, 0.5], [0.0] * 5])
    scores = dataclasses.replace(scores, swap_rate=rates)
    (line,) = doubts(resolved(scores, swap_rate=0.4), scores)
    assert line.startswith("swap_rate 0.4 is more than λ = 0.2") and "changes in 2 of 3 layers" in line
    (line,) = doubts(resolved(scores, swap_rate=0.3), scores)
    assert "changes in 1 of 3 layers" in line
