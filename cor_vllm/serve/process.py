"""What the engine of this process was started with: the options, the scores file, each layer's routing."""

import functools
from typing import TYPE_CHECKING

from cor_vllm.scores import Scores, ScoresError, digest, parse, read_bytes
from cor_vllm.serve.config import ConfigError, CorConfig, LayerRouting, doubts, plan

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
    if config.sha256 is None:
        raise ConfigError(
            "cor: the engine was configured without the plugin; is VLLM_PLUGINS set to leave out cor?"
        )
    return config


@functools.lru_cache(maxsize=4)
def layers_of(config: CorConfig) -> dict[int, LayerRouting]:
    """The routing of this process by decoder layer number."""
    return plan(config, scores_of(config))


@functools.lru_cache(maxsize=4)
def doubts_of(config: CorConfig) -> tuple[str, ...]:
    """What is to be said about these options with this process's scores file, one line each."""
    return tuple(doubts(config, scores_of(config)))


def scores_of(config: CorConfig) -> Scores:
    """The very file that the engine was started with; read once, so that replacing it later does no harm.

    Raises:
        ScoresError: it is another one by now, or on this node.
    """
    assert config.sha256 is not None, "config_of checks that"
    return _read(config.scores, config.sha256)


@functools.lru_cache(maxsize=1)
def _read(path: str, sha256: str) -> Scores:
    data = read_bytes(path)
    if digest(data) != sha256:
        raise ScoresError(
            f"{path}: the file has changed since the engine was started, or differs on this node; "
            "restart the server, and keep one copy of the file on every node"
        )
    return parse(data, path)
