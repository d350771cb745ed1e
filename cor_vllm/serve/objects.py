"""The objects of vLLM that run a model, as far as this plugin touches them (seams.py has where they are)."""

from typing import TYPE_CHECKING, Any, Protocol

import torch

from cor_vllm.serve.config import CorConfig
from cor_vllm.serve.gate import Switch

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Owner(Protocol):
    """A worker or an engine core."""

    vllm_config: "VllmConfig"
    cor_config: CorConfig | None  # the options that it follows now; ours, set by prefix_cache.current


class Worker(Owner, Protocol):
    """One process that holds a model, or a part of one."""

    rank: int
    cor_switch: Switch  # ours, set by overlaid.weights_arrived if this worker has the layer of a router file

    def get_model(self) -> torch.nn.Module:
        """The model, or this worker's part of it."""


class EngineCore(Owner, Protocol):
    """The loop that schedules the requests of one engine; its workers run the model."""

    model_executor: Any  # has is_sleeping
    scheduler: Any  # has requests, by their id

    def collective_rpc(
        self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()
    ) -> list[Any]:
        """The answers of all workers, by rank."""

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget all blocks; requests that run are computed again if asked for."""


class Request(Protocol):
    """One request in an engine core."""

    cache_salt: str  # ours, then the user's
    block_hashes: list[Any]

    def update_block_hashes(self) -> None:
        """Hash the blocks that have no hash yet."""
