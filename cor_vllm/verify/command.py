"""`cor-vllm verify`: load a model in vLLM and prove, layer by layer, that it is routed as its files say."""

import io
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from cor_vllm.commands import exits, lifetime
from cor_vllm.commands.engine_flags import Own, given
from cor_vllm.errors import CorError, cause
from cor_vllm.serve import compat, cpu

if TYPE_CHECKING:
    from cor_vllm.serve.config import CorConfig

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 24, 2
SMALL = ("--max-model-len", "256", "--kv-cache-memory-bytes", str(512 * 2**20))  # a probe needs no more


class VerifyError(CorError):
    """The engine did not start, or did not answer: one line with the cause."""


def verify(model: str, files: dict[str, str], flags: list[str], as_json: bool) -> int:
    """Load the model with its files, run a probe batch, print what was found.

    Args:
        model: folder or hub id, as for `vllm serve`.
        files: the scores file as "cor_scores", the router file as "cor_router", or one of them.
        flags: further flags of vLLM's engine, --cor-… included.
        as_json: JSON on stdout in place of the report.

    Returns:
        0 if every layer is routed as the files say, exits.MISROUTED where one is not.

    Raises:
        FlagError: a flag contradicts the command.
        VerifyError: the engine did not start.
    """
    # The report is for stdout; vLLM logs there, too, unless it is told otherwise before it is imported.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    # In this process, where one worker is enough, so that its errors are our errors.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    lifetime.guard()
    llm, changes = _load(model, files, flags)
    report = inspect(llm)
    report["notes"] = changes + report["notes"]
    print(json.dumps(report) if as_json else render(report))
    return exits.MISROUTED if report["problems"] else 0


def _load(model: str, files: dict[str, str], flags: list[str]) -> tuple[Any, list[str]]:
    """The engine, and what was chosen for it that a server on this machine needs, too."""
    from cor_vllm import register

    register()
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    own = {
        "model": Own(model, f"what is verified, and named in the report, is {model}"),
        **{
            name: Own(path, f"give {_flag(name)} once, to this command itself")
            for name, path in files.items()
        },
        "enforce_eager": Own(True, "the probe watches an eager engine"),
    }
    given(EngineArgs.add_cli_args(FlexibleArgumentParser(prog="cor-vllm verify")), flags, own)
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="cor-vllm verify"))
    # Eager: what a CUDA graph or a compiled model does cannot be watched from Python.
    ours = [part for name, path in files.items() for part in (_flag(name), path)]
    args = parser.parse_args(["--model", model, *ours, *SMALL, *flags, "--enforce-eager"])
    try:
        engine_args = EngineArgs.from_cli_args(args)
        changes = cpu.mend(engine_args)
        return LLM.from_engine_args(engine_args), changes
    except (ValueError, RuntimeError, OSError) as error:
        raise VerifyError(cause(error)) from error


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def inspect(llm: Any) -> dict[str, Any]:
    """Run a probe batch through a vLLM engine and collect what its workers found.

    Args:
        llm: vllm.LLM, eager, with counterfactual routing configured.

    Returns:
        "model", "versions", "cor" (the options), "layers" (judge.LayerVerdict as dictionaries, of every
        worker; none without a scores file), "routers" (gate_judge.GateVerdict as dictionaries, of every
        worker that has the layer of a router file), "problems" (one line each) and "notes" (what is wrong
        with the engine next to its routing, one line each).

    Raises:
        VerifyError: a worker does not have the plugin.
    """
    from cor_vllm.serve.process import config_of

    config = llm.llm_engine.vllm_config
    options = config_of(config)
    if options is None:
        raise VerifyError("the engine runs without counterfactual routing: is COR_DISABLE set?")
    found = _probe(llm, config.model_config.get_vocab_size())
    layers = [row for worker in found for row in worker["layers"]]
    routers = [worker["router"] for worker in found if worker["router"] is not None]
    problems = [
        f"{row['name']} (worker {row['worker']}): {p}" for row in layers + routers for p in row["problems"]
    ]
    if options.scores is not None and not layers:
        problems.append("no MoE layer was found")
    if options.router is not None and not routers:
        problems.append("no worker has the layer of the router file")
    return {
        "model": config.model_config.model,
        "versions": {
            **compat.versions(),
            "python": platform.python_version(), "device": _device(),
        },
        "cor": _shown(options),
        "layers": layers,
        "routers": routers,
        "problems": problems,
        "notes": cpu.warnings(config),
    }  # fmt: skip


def _probe(llm: Any, vocabulary: int) -> list[dict[str, Any]]:
    """What each worker found while it answered a small batch of prompts."""
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [(7 + 131 * i + 17 * j + j * j) % vocabulary for j in range(PROMPT_TOKENS)]}
        for i in range(PROMPTS)
    ]
    try:
        llm.collective_rpc("cor_probe_begin")
    except (AttributeError, NotImplementedError) as error:  # what vLLM raises for a method that no worker has
        raise VerifyError(f"a worker runs without the plugin cor-vllm ({error})") from error
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS), use_tqdm=False)
    found: list[dict[str, Any]] = llm.collective_rpc("cor_probe_end")
    return found


def _shown(options: "CorConfig") -> dict[str, Any]:
    """The options, with the mode and λ of the scores file if they have none."""
    from cor_vllm.serve.process import scores_of

    given = options.model_dump(by_alias=True, exclude_none=True)
    if options.scores is None:
        needless = ("weights", "seed", "observe")
        return {name: value for name, value in given.items() if name not in needless}
    serving = scores_of(options).config.serving
    mode = "static k" if options.static_k else options.mode or serving.mode
    return {"mode": mode, "lambda": serving.lambda_} | given


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def render(report: dict[str, Any]) -> str:
    """The report as text: Markdown that can be pasted into an issue."""
    cor, layers, routers = report["cor"], report["layers"], report["routers"]
    workers = sorted({row["worker"] for row in layers + routers})
    head = [f"model: {report['model']}"]
    for name, sha256 in (("scores", "sha256"), ("router", "router_sha256")):
        if name in cor:
            head.append(f"{name}: {cor[name]}, sha256 {cor[sha256][:16]}")
    named = ("scores", "sha256", "router", "router_sha256")
    head.append("options: " + json.dumps({k: v for k, v in cor.items() if k not in named}))
    head.append("versions: " + ", ".join(f"{name} {value}" for name, value in report["versions"].items()))
    tables = []
    if "scores" in cor:
        head.append(f"Σ k = {sum({row['layer']: row['k'] for row in layers}.values())}")
        tables += ["", *_layer_table(layers)]
    if "router" in cor:
        tables += ["", *_router_table(routers)]
    verdict = [f"PROBLEM: {problem}" for problem in report["problems"]]
    if not verdict and "scores" in cor:
        verdict.append(
            f"All {len(layers)} layers of {len(workers)} worker(s) are routed as the scores file says."
        )
    if not report["problems"] and "router" in cor:
        verdict.append(f"Decoder layer {routers[0]['layer']} computes with the router of the router file.")
    notes = [f"NOTE: {note}" for note in report["notes"]]
    return "\n".join([*head, *tables, "", *verdict, *notes])


def _layer_table(layers: list[dict[str, Any]]) -> list[str]:
    columns = ("layer", "kernel", "modular", "router", "k", "tokens", "as expected", "weights off by",
               "slots changed", "λ=0 is stock")  # fmt: skip
    rows, shown = [], set()
    for row in layers:
        if row["layer"] in shown and not row["problems"]:
            continue  # the same layer on another rank, and all is well with it
        shown.add(row["layer"])
        rows.append((
            str(row["layer"]), row["kernel"], "yes" if row["modular"] else "NO", row["router"], str(row["k"]),
            str(row["tokens"]), f"{row['as_expected']:.0%}", f"{row['weights_error']:.1g}",
            f"{row['changed']:.1%}", f"{row['lambda_0']:.0%}",
        ))  # fmt: skip
    return _markdown(columns, rows)


def _router_table(routers: list[dict[str, Any]]) -> list[str]:
    columns = ("layer", "worker", "tokens", "logits off by", "experts of these logits")
    rows = [
        (
            str(row["layer"]), str(row["worker"]), str(row["tokens"]), f"{row['logits_error']:.1g}",
            "see above" if row["as_expected"] is None else f"{row['as_expected']:.0%}",
        )
        for row in routers
    ]  # fmt: skip
    return _markdown(columns, rows)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    table = Table(box=box.MARKDOWN)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    Console(width=150, file=text).print(table)
    return [line.strip() for line in text.getvalue().strip().splitlines()]


def main(model: str, files: dict[str, str], flags: list[str], as_json: bool) -> int:
    """The command: `verify` with errors as one line on stderr."""
    try:
        return verify(model, files, flags, as_json)
    except VerifyError as error:
        print(f"cor-vllm: error: {error}", file=sys.stderr)
        return 1
