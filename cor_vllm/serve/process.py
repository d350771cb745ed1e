"""What the engine of this process was started with: the options, its files, each layer's routing."""

import functools
from typing import TYPE_CHECKING

from cor_vllm import overlay as overlay_file
from cor_vllm import scores as scores_file
from cor_vllm.errors import CorError
from cor_vllm.overlay import OverlayError, RouterOverlay
from cor_vllm.scores import Scores, ScoresError
from cor_vllm.serve.config import ConfigError, CorConfig, LayerRouting, doubts, plan
from cor_vllm.tensor_file import digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def config_of(vllm_config: "VllmConfig") -> CorConfig | None:
    """The options that the engine was started with, resolved; None if it was started without ours.

    Raises:
        ConfigError: options that no front end with the plugin has seen.
    """
    additional = vllm_config.additional_config
    options = additional.get("cor") if isinstance(additional, dict) else None
    if options is None:
        return None
    config = CorConfig.of(options)
    if config.sha256 is None and config.router_sha256 is None:
        raise ConfigError(
            "cor: the engine was configured without the plugin; is VLLM_PLUGINS set to leave out cor?"
        )
    return config


@functools.lru_cache(maxsize=4)
def layers_of(config: CorConfig) -> dict[int, LayerRouting]:
    """The routing of this process by decoder layer number; empty without a scores file."""
    return plan(config, scores_of(config)) if config.scores is not None else {}


@functools.lru_cache(maxsize=4)
def doubts_of(config: CorConfig) -> tuple[str, ...]:
    """What is to be said about these options with this process's scores file, one line each."""
    return tuple(doubts(config, scores_of(config))) if config.scores is not None else ()


def scores_of(config: CorConfig) -> Scores:
    """The very scores file that the engine was started with.

    Each file is read once, so that replacing it later does no harm.

    Raises:
        ScoresError: it is another one by now, or on this node.
    """
    assert config.scores is not None and config.sha256 is not None, "asked only if there is one"
    return _scores(config.scores, config.sha256)


def overlay_of(config: CorConfig) -> RouterOverlay | None:
    """The very router file that the engine was started with; None if it was started without one.

    Raises:
        OverlayError: it is another one by now, or on this node.
    """
    if config.router is None:
        return None
    assert config.router_sha256 is not None, "filled in with the path"
    return _overlay(config.router, config.router_sha256)


@functools.lru_cache(maxsize=1)
def _scores(path: str, sha256: str) -> Scores:
    data = scores_file.read_bytes(path)
    _refuse_other(data, path, sha256, ScoresError)
    return scores_file.parse(data, path)


@functools.lru_cache(maxsize=1)
def _overlay(path: str, sha256: str) -> RouterOverlay:
    data = overlay_file.read_bytes(path)
    _refuse_other(data, path, sha256, OverlayError)
    return overlay_file.parse(data, path)


def _refuse_other(data: bytes, path: str, sha256: str, error: type[CorError]) -> None:
    if digest(data) != sha256:
        raise error(
            f"{path}: the file has changed since the engine was started, or differs on this node; "
            "restart the server, and keep one copy of the file on every node"
        )
