"""A server that says whatever a test wants of itself: faults that a real one cannot be made to have."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cor_vllm.live.state import Layer, Router, State, Worker
from cor_vllm.overlay import RouterOverlay
from cor_vllm.scores import Scores
from cor_vllm.serve.config import CorConfig, plan


class Fake:
    """What it answers, open to change while it runs.

    Args:
        served: what it calls its model.
        root: the model that it says it was started with.
        cor: the answer to GET /v1/cor; None: 404.
    """

    def __init__(self, served: str, root: str, cor: dict[str, Any] | None = None) -> None:
        self.models: Any = {"data": [{"id": served, "root": root, "max_model_len": 256}]}
        self.cor = cor
        self.status: dict[str, int] = {}  # path → what it answers instead of 200
        self.key: str | None = None
        self.tokens: list[int] | None = None  # of any text; None: no /tokenize
        self.prompts: list[list[int]] = []  # that were asked
        self.url = ""

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON."""
        if path in self.status:
            return self.status[path], {"error": f"{path} was made to fail"}
        if path == "/v1/models":
            return 200, self.models
        if path == "/v1/cor" and self.cor is not None:
            return 200, self.cor
        if path == "/tokenize" and self.tokens is not None:
            return 200, {"tokens": self.tokens}
        if path == "/v1/completions":
            self.prompts += body["prompt"]
            return 200, {"choices": [_choice(i, prompt) for i, prompt in enumerate(body["prompt"])]}
        return 404, {"error": "no such path"}


def _choice(index: int, prompt: list[int]) -> dict[str, Any]:
    values = [None, *(-1.0 - token % 7 for token in prompt[1:]), -1.0]
    top: list[Any] = [None if value is None else {"a": value} for value in values]
    return {"index": index, "text": "", "logprobs": {"token_logprobs": values, "top_logprobs": top}}


@contextlib.contextmanager
def running(fake: Fake) -> Iterator[Fake]:
    """The server, for as long as the context lasts; `fake.url` is its address."""

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
                status, answer = 401, {"error": "Unauthorized"}
            else:
                status, answer = fake.answer(self.path, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _reply

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()


def state(
    scores: Scores | None, sha256: str | None, overlay: RouterOverlay | None = None, on: bool = True,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """What GET /v1/cor answers of a server.

    Args:
        scores: its scores; None: it has none.
        sha256: of their file.
        overlay: the router of its router file; None: it has none.
        on: whether that is in force.
        options: of additional_config["cor"].
    """
    found = State(
        **_of_scores(scores, sha256, options),
        version="0.1.0",
        router=None if overlay is None else _router(overlay, on),
        warnings=[],
        workers=[Worker(engine=0, rank=0, hooked_layers=0)],
    )
    answer: dict[str, Any] = json.loads(found.model_dump_json(by_alias=True))
    return answer


def _router(overlay: RouterOverlay, on: bool) -> Router:
    return Router(
        sha256="0" * 64, fingerprint=overlay.fingerprint, layer=overlay.layer, on=on,
        drift=overlay.config.drift, objective=overlay.config.training.objective, warnings=[],
    )  # fmt: skip


def _of_scores(scores: Scores | None, sha256: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a State that depend on a scores file."""
    if scores is None:
        nothing = ("scores_sha256", "mode", "lambda_", "swap_rate", "static_k", "weights", "seed",
                   "model_top_k", "budget", "model_budget")  # fmt: skip
        return dict.fromkeys(nothing) | {
            "fingerprint": "0" * 64, "layers": [], "admin": False, "observe": False
        }  # fmt: skip
    config = CorConfig.of({"scores": "-", **options}).resolved(scores.config.serving)
    layers = plan(config, scores)
    has_lambda = config.mode in ("full", "expert")
    return {
        "scores_sha256": sha256,
        "fingerprint": scores.config.model.fingerprint,
        "mode": config.mode or "static_k",
        "lambda_": config.lambda_ if has_lambda else None,
        "swap_rate": config.swap_rate if has_lambda else None,
        "static_k": config.static_k,
        "weights": config.weights,
        "seed": config.seed,
        "admin": config.admin,
        "observe": config.observe,
        "model_top_k": scores.config.model.top_k,
        "budget": sum(layer.top_k for layer in layers.values()),
        "model_budget": len(layers) * scores.config.model.top_k,
        "layers": [
            Layer(
                layer=index, name=f"layers.{index}", router="CorRouter", kernel="K", k=layer.top_k,
                lambda_=layer.lambda_, biased=layer.biased,
            )
            for index, layer in layers.items()
        ],
    }  # fmt: skip
