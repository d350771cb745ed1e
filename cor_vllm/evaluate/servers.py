"""Servers that run already, as rows of the table: what each says of itself, held against its name."""

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from cor_vllm import overlay as overlay_file
from cor_vllm import scores as scores_file
from cor_vllm.evaluate.benchmarks import EvaluationError
from cor_vllm.evaluate.claims import Claim, check, described, state_of
from cor_vllm.evaluate.conditions import (
    AGAIN,
    DEFINED_BY_A_FILE,
    ROUTER,
    STANDARD,
    Condition,
    modes,
    on_transformers,
)
from cor_vllm.live.state import State
from cor_vllm.overlay import RouterOverlay
from cor_vllm.scores import Scores

NAME = re.compile(r"[\w+@-][\w.+@-]*")  # also the name of a file
TIMEOUT_SECONDS = 30
NO_SUCH_PATH = (404, 405, 501)
KEY_WANTED = (401, 403)


@dataclass(frozen=True)
class Server:
    """A server as it describes itself."""

    name: str  # of the row
    url: str
    served_name: str  # what it calls the model
    root: str | None  # the model that it was started with, if it says so
    max_model_len: int | None  # tokens of a prompt and its answer, if it says so
    cor: Any  # what GET /v1/cor answers; None: there is no such path

    @property
    def where(self) -> str:
        """For messages."""
        return f"server {self.name} ({self.url})"

    @property
    def state(self) -> State | None:
        """How it routes; None: without counterfactual routing."""
        return state_of(self.cor, self.where)


def base_of(name: str, url: str) -> str:
    """The address without /v1 and a closing slash.

    Raises:
        EvaluationError: it is not an address, or the name cannot be a row's.
    """
    if not NAME.fullmatch(name):
        raise EvaluationError(
            f"--server {name}={url}: a row's name is also a file's: letters, digits, and . _ + @ - within"
        )
    try:
        parts = urlsplit(url)
        port_is_one = parts.port != 0  # ValueError if it is not a port
    except ValueError:
        parts, port_is_one = urlsplit(""), False
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_one:
        raise EvaluationError(f"--server {name}={url}: not an address like http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def check_addresses(servers: Mapping[str, str]) -> None:
    """One server cannot be two rows, except standard and its repeat.

    Raises:
        EvaluationError: it would be.
    """
    seen: dict[str, str] = {}
    for name, url in servers.items():
        base = base_of(name, url).lower()
        first = seen.setdefault(base, name)
        if first != name and {first, name} != {STANDARD, AGAIN}:
            raise EvaluationError(
                f"--server {name}={url}: the server of the row {first!r}, too; one server is one row (only "
                f"{STANDARD} and {AGAIN} may be the same)"
            )


def look(name: str, url: str, model: str, served_name: str | None) -> Server:
    """Ask a server what it is.

    Args:
        name: the row's.
        url: the server's address, with or without /v1.
        model: the model that the table is about: folder or hub id.
        served_name: what the server calls it; None: its first model, which must be known by the model's name.

    Raises:
        EvaluationError: it does not answer, or serves another model.
    """
    base = base_of(name, url)
    where = f"server {name} ({url})"
    answer = _get(base, "models", where)
    try:
        entries = {str(entry["id"]): entry for entry in answer["data"]}
        first = next(iter(entries))
    except (LookupError, TypeError, StopIteration):
        raise EvaluationError(f"{where}: does not say which models it has; is this its address?") from None
    served = served_name or first
    if served not in entries:
        raise EvaluationError(f"{where}: has no model {served!r} (--served-name), but {', '.join(entries)}")
    entry = entries[served]
    root = str(entry["root"]) if entry.get("root") else None
    if served_name is None and not any(_same_model(model, other) for other in (root, served) if other):
        started = f", started as {root!r}" if root and root != served else ""
        raise EvaluationError(
            f"{where}: serves {served!r}{started}, not {model}; if that is the same model, say so with "
            f"--served-name {served}"
        )
    length = entry.get("max_model_len")
    return Server(
        name, url, served, root, length if isinstance(length, int) else None, _get(base, "cor", where)
    )


def _same_model(model: str, other: str) -> bool:
    """Whether two names can be of one model: the same folder, or the same last part."""
    if Path(model).is_dir() and Path(other).is_dir():
        return Path(model).resolve() == Path(other).resolve()
    return _last(model) == _last(other)


def _last(name: str) -> str:
    path = str(Path(name).resolve()) if Path(name).is_dir() else name
    return path.rstrip("/").split("/")[-1].lower()


def _get(base: str, what: str, where: str, body: Any = None) -> Any:
    """The JSON of BASE/v1/WHAT; None if there is no such path.

    Raises:
        EvaluationError: the server does not answer, or not so.
    """
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if body is not None:
        headers["Content-Type"] = "application/json"
    request = Request(
        f"{base}/v1/{what}" if body is None else f"{base}/{what}",
        headers=headers,
        data=None if body is None else json.dumps(body).encode(),
    )
    try:
        with urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            return json.load(answer)
    except HTTPError as error:
        if error.code in NO_SUCH_PATH and what != "models":
            return None
        if error.code in KEY_WANTED:
            raise EvaluationError(
                f"{where}: refuses /v1/{what} ({error.code}): set OPENAI_API_KEY to the key that it wants"
            ) from None
        reason = error.read(300).decode(errors="replace").strip().splitlines()
        raise EvaluationError(
            f"{where}: /v1/{what}: {error.code} {error.reason}{': ' + reason[0] if reason else ''}"
        ) from None
    except (OSError, HTTPException, ValueError) as error:
        raise EvaluationError(
            f"{where}: /v1/{what} does not answer ({error}); is the server up, and is this its address?"
        ) from None


def check_tokenizer(server: Server, tokenizer: Any) -> None:
    """Hold the server's tokens of a text against those of the tokenizer that makes the prompts.

    Raises:
        EvaluationError: they differ: the server has another model.
    """
    text = "Montreux lies on Lake Geneva; 1,234 people (2019) said: naïve?"
    body = {"model": server.served_name, "prompt": text, "add_special_tokens": False}
    answer = _get(base_of(server.name, server.url), "tokenize", server.where, body)
    theirs = answer.get("tokens") if isinstance(answer, dict) else None
    if theirs is not None and theirs != tokenizer(text, add_special_tokens=False).input_ids:
        raise EvaluationError(
            f"{server.where}: {server.served_name!r} has another tokenizer than MODEL, which makes the "
            "prompts: it serves another model"
        )


def check_unchanged(server: Server, model: str, served_name: str | None) -> None:
    """Ask the server once more, after a measurement.

    Raises:
        EvaluationError: it is another one by now, or routes otherwise.
    """
    now = look(server.name, server.url, model, served_name)
    if now != server:
        raise EvaluationError(
            f"{server.where}: changed while it was measured: before, {server.served_name}, "
            f"{described(server.state)}; now {now.served_name}, {described(now.state)}. What was measured "
            "meanwhile is not kept; the same command measures it again"
        )


def claimed(
    server: Server,
    rows: Mapping[str, Condition],
    sources: Mapping[str, Scores],
    files: Mapping[str, Path],
    folder: Path,
    router: Callable[[Condition], RouterOverlay | None],
) -> Condition:
    """The row of a server, after what it says was held against its name.

    Args:
        server: which.
        rows: the conditions that the files have, by name; empty: no file was given.
        sources: the scores by the name of their file.
        files: the paths of these files.
        folder: where a condition's own file is written, if the server should have that one.
        router: what takes the place of the model's own router in a condition.

    Raises:
        EvaluationError: it is not what it is called.
    """
    name, state = server.name, server.state
    known = {row.name: row for row in (*modes({}), *on_transformers({}))} | dict(rows)
    if name in known and known[name].transformers_only:
        raise EvaluationError(f"--server {name}: only transformers can do that row: --backend transformers")
    if name not in known:
        _check_own_name(name, {"--cor-scores": bool(sources), "--cor-router": ROUTER in rows})
        return Condition(name, f"server {name}: {described(state)}")
    condition = known[name]
    claim = Claim(condition.options)
    if condition.options is not None and condition.source in sources:
        claim = _claim_of_scores(server, condition, sources[condition.source], files, folder)
    overlay = router(condition)
    if overlay is not None:
        _check_random_router(server, condition, overlay, folder)
        claim = dataclasses.replace(claim, router=overlay.fingerprint)
    check(server.where, name, claim, state)
    description = f"{condition.description}; {described(state)}"
    # What decides its numbers is what the server says, not the options.
    return dataclasses.replace(condition, description=description, options=None, router=None)


def _check_own_name(name: str, given: Mapping[str, bool]) -> None:
    """A name that the table does not know must not look like one that a file defines."""
    flag = next((flag for look, flag in DEFINED_BY_A_FILE.items() if fnmatchcase(name, look)), None)
    if flag is not None:
        noun = "scores" if flag == "--cor-scores" else "router"
        missing = f"give {flag} FILE, which defines it"
        remedy = "no such row: see --list-conditions" if given[flag] else missing
        raise EvaluationError(f"--server {name}: a name of a row that a {noun} file defines; {remedy}")


def _claim_of_scores(
    server: Server, condition: Condition, scores: Scores, files: Mapping[str, Path], folder: Path
) -> Claim:
    """What a row of a scores file claims; a server that should have changed scores is told which file."""
    state, data = server.state, files[condition.source].read_bytes()
    if condition.change is None:
        return Claim(condition.options, scores, scores_file.digest(data))
    scores = condition.change(scores)
    sha256 = scores_file.digest(_written(scores, folder))
    if state and state.scores_sha256 != sha256:
        kept = folder / f"{condition.name}.safetensors"
        scores_file.save(kept, scores)
        raise EvaluationError(
            f"{server.where} is not what the row {condition.name!r} is called: it has another scores file "
            f"than that row's, which is now in {kept}: start it with --cor-scores {kept}"
        )
    return Claim(condition.options, scores, sha256)


def _check_random_router(server: Server, condition: Condition, overlay: RouterOverlay, folder: Path) -> None:
    """A server that should have a random router is told which file."""
    state = server.state
    theirs = state.router.fingerprint if state and state.router else None
    if condition.router is None or condition.router.seed is None or theirs == overlay.fingerprint:
        return
    kept = folder / f"{condition.name}.safetensors"
    overlay_file.save(kept, overlay)
    raise EvaluationError(
        f"{server.where} is not what the row {condition.name!r} is called: it does not have that row's "
        f"router, which is now in {kept}: start it with --cor-router {kept}"
    )


def _written(scores: Scores, folder: Path) -> bytes:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "scores.safetensors"
        scores_file.save(path, scores)
        return path.read_bytes()
