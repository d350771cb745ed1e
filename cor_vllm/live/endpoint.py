"""GET and POST /v1/cor on vLLM's API server: show how the workers route, and change it while serving.

Nothing is kept here: with several API servers, each asks the engine cores, which ask their workers. The path
is below /v1, which vLLM's --api-key guards.
"""

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI, Request

    from cor_vllm.live.metrics import Metrics
    from cor_vllm.live.state import Change, State

logger = logging.getLogger("vllm.cor")  # below vLLM's own, whose level and format it takes on
PATH = "/v1/cor"
MAX_BODY_BYTES = 4096
COUNT_SECONDS = 5.0  # between two readings of the device counters


def load_endpoint_plugins(original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """vLLM's loader of endpoint plugins, which then brings ours, too.

    Alone it loads endpoint plugins only if VLLM_PLUGINS names them, which would leave out all other plugins
    that it does not name.
    """

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> list[Any]:
        return [*original(*args, **kwargs), CorEndpoint()]

    return load


class Engines:
    """The engine cores of a server, reached as vLLM's own endpoints reach them."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def call(self, method: str, *args: Any) -> list[Any]:
        """One answer per engine core of control.py's `method`, which runs between two steps of the model."""
        answers: list[Any] = await self._client.engine_core.call_utility_all_async(method, *args)
        return answers

    async def state(self) -> "State":
        """What all workers say of themselves; StateError if they differ."""
        from cor_vllm.live.state import combine

        return combine(await self.call("cor_status"))


class CorEndpoint:
    """vLLM's endpoint plugin: attached to every server, at work if additional_config has "cor"."""

    name = "cor"
    required_tasks = None

    def attach_router(self, app: "FastAPI") -> None:
        """Add the routes."""
        if "cor" in (getattr(app.state.args, "additional_config", None) or {}):
            app.include_router(build_router())

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Give the routes their engines, and publish the metrics."""
        if engine_client is None or "cor" not in (engine_client.vllm_config.additional_config or {}):
            return
        from cor_vllm.live.metrics import Activations, Metrics

        engines = Engines(engine_client)
        now = await engines.state()
        state.cor_engines = engines
        state.cor_metrics = metrics = Metrics(now)
        # The manager is None with --disable-log-stats.
        if engine_client.logger_manager is not None and now.budget is not None:
            engine_client.logger_manager.stat_loggers.append(Activations(metrics, now.budget))
        if now.observe and engine_client.vllm_config.parallel_config._api_process_rank <= 0:
            # One of several servers counts: their counters are added up.
            metrics.count(await engines.call("cor_counts"))
            state.cor_counting = asyncio.create_task(_count(engines, metrics))


async def _count(engines: Engines, metrics: "Metrics") -> None:
    while True:
        await asyncio.sleep(COUNT_SECONDS)
        metrics.count(await engines.call("cor_counts"))


def build_router() -> "APIRouter":
    """The two routes; they expect `app.state.cor_engines` and `app.state.cor_metrics`."""
    from fastapi import APIRouter, HTTPException, Request

    from cor_vllm.live.state import Change, State, StateError

    router = APIRouter(tags=["Counterfactual Routing"])

    async def read(engines: Engines) -> State:
        try:
            return await engines.state()
        except StateError as error:
            raise HTTPException(409, str(error)) from None

    def engines_of(request: Request) -> Engines:
        engines: Engines | None = getattr(request.app.state, "cor_engines", None)
        if engines is None:
            raise HTTPException(503, "this server has no engine; ask the one that serves the model")
        return engines

    @router.get(PATH)
    async def show(request: Request) -> State:
        """How the workers route, read off their layers."""
        return await read(engines_of(request))

    body = {"required": True, "content": {"application/json": {"schema": Change.model_json_schema()}}}

    @router.post(PATH, openapi_extra={"requestBody": body})
    async def change(request: Request) -> State:
        """Change λ, mode or router on every worker, between two steps; answer how they route then."""
        engines, metrics = engines_of(request), request.app.state.cor_metrics
        before = await read(engines)
        if not before.admin:
            raise HTTPException(403, "changes are off: start the server with --cor-admin")
        wanted = await _body(request)
        # First ask all, then tell all: if one refuses, no engine changes.
        for method in ("cor_check", "cor_change"):
            for refused in await engines.call(method, wanted.lambda_, wanted.mode, wanted.router):
                if refused:
                    raise HTTPException(409, refused)
        metrics.publish(before)  # another server may have changed it since this one last did
        after = await read(engines)
        metrics.publish(after)
        logger.info("CoR: %s", _line(before, after))
        for line in [*after.warnings, *(after.router.warnings if after.router else [])]:
            logger.warning("CoR: %s", line)
        return after

    return router


async def _body(request: "Request") -> "Change":
    """The request's Change; HTTPException 413, 415 or 400 with one line if it is not one."""
    from fastapi import HTTPException

    from cor_vllm.live.state import Change, ChangeError

    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # no web page can send that to another site unasked
        raise HTTPException(415, "send the header Content-Type: application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"body: more than {MAX_BODY_BYTES} bytes")
    try:
        return Change.of(bytes(body))
    except ChangeError as error:
        raise HTTPException(400, str(error)) from None


def _line(before: "State", after: "State") -> str:
    return f"{_routing(before)} → {_routing(after)}"


def _routing(state: "State") -> str:
    parts = [] if state.mode is None else [f"mode {state.mode}", f"λ {state.lambda_}"]
    if state.router is not None:
        parts.append(f"router of the file {'on' if state.router.on else 'off'}")
    return ", ".join(parts)
