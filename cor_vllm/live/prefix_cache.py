"""The prefix cache's key: every request's blocks are hashed with the routing that fills them.

vLLM chains block hashes from the first block on, which includes the request's `cache_salt`. Ours stands
before the user's own. Two scores files, or on and off, therefore never share a block, in this engine or in
an external store of blocks.

What the last decoder layer's experts add feeds no key and no value. A router file for that layer therefore
leaves the cache as it is, and requests that run go on.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

from cor_vllm.serve.config import CorConfig
from cor_vllm.serve.objects import EngineCore, Owner, Request
from cor_vllm.serve.process import config_of, overlay_of


def preprocess_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """EngineCore.preprocess_add_request, which hashes a request's blocks, with our salt on the request."""

    @functools.wraps(original)
    def preprocess(core: EngineCore, request: Any) -> Any:
        if salt := salt_of(current(core)):
            request.cache_salt = salt + (request.cache_salt or "")
        return original(core, request)

    return preprocess


def add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    """EngineCore.add_request: the routing may have changed since another thread prepared the request."""

    @functools.wraps(original)
    def add(core: EngineCore, request: Request, *args: Any, **kwargs: Any) -> Any:
        renew_salt(core, request)
        return original(core, request, *args, **kwargs)

    return add


def current(owner: Owner) -> CorConfig | None:
    """The options that a worker or an engine core follows now: those of its start, or of the last change."""
    if "cor_config" not in vars(owner):
        owner.cor_config = config_of(owner.vllm_config)
    return owner.cor_config


def renew_salt(core: EngineCore, request: Request) -> None:
    """Hash a request's blocks anew if they were hashed under another routing than that of its engine core."""
    salt = salt_of(current(core))
    if not salt or request.cache_salt.startswith(salt):
        return
    request.cache_salt = salt + request.cache_salt[len(salt) :]
    request.block_hashes = []
    request.update_block_hashes()


@functools.lru_cache(maxsize=4)
def salt_of(config: CorConfig | None) -> str:
    """What keeps apart the blocks that are filled under these options; empty if stock vLLM fills the same.

    With one engine's options its length is always the same, whatever is changed while it runs.
    """
    if config is None:
        return ""
    digest = config.routing_digest() if config.scores is not None else ""
    overlay = overlay_of(config)
    if overlay is None or overlay.layer == overlay.config.model.num_hidden_layers - 1:
        return digest
    router = overlay.fingerprint if config.router_on else "off"
    return hashlib.sha256(f"{digest} {router}".encode()).hexdigest()
