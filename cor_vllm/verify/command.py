"""`cor-vllm verify`: load a model in vLLM and prove, layer by layer, that it is routed as its file says."""

import io
import json
import os
import platform
import sys
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cor_vllm.commands import exits, lifetime
from cor_vllm.commands.engine_flags import Own, given
from cor_vllm.errors import CorError, cause
from cor_vllm.serve import compat, cpu

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 24, 2
SMALL = ("--max-model-len", "256", "--kv-cache-memory-bytes", str(512 * 2**20))  # a probe needs no more


class VerifyError(CorError):
    """The engine did not start, or did not answer: one line with the cause."""


def verify(model: str, scores: str, flags: list[str], as_json: bool) -> int:
    """Load the model with its scores file, run a probe batch, print what was found.

    Args:
        model: folder or hub id, as for `vllm serve`.
        scores: the scores file.
        flags: further flags of vLLM's engine, --cor-… included.
        as_json: JSON on stdout in place of the report.

    Returns:
        0 if every layer is routed as the file says, exits.MISROUTED where one is not.

    Raises:
        FlagError: a flag contradicts the command.
        VerifyError: the engine did not start.
    """
    # The report is for stdout; vLLM logs there, too, unless it is told otherwise before it is imported.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    # In this process, where one worker is enough, so that its errors are our errors.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    lifetime.guard()
    llm, changes = _load(model, scores, flags)
    report = inspect(llm)
    report["notes"] = changes + report["notes"]
    print(json.dumps(report) if as_json else render(report))
    return exits.MISROUTED if report["problems"] else 0


def _load(model: str, scores: str, flags: list[str]) -> tuple[Any, list[str]]:
    """The engine, and what was chosen for it that a server on this machine needs, too."""
    from cor_vllm import register

    register()
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    own = {
        "model": Own(model, f"what is verified, and named in the report, is {model}"),
        "cor_scores": Own(scores, "give --cor-scores once, to this command itself"),
        "enforce_eager": Own(True, "the probe watches an eager engine"),
    }
    given(EngineArgs.add_cli_args(FlexibleArgumentParser(prog="cor-vllm verify")), flags, own)
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="cor-vllm verify"))
    # Eager: what a CUDA graph or a compiled model does cannot be watched from Python.
    args = parser.parse_args(["--model", model, "--cor-scores", scores, *SMALL, *flags, "--enforce-eager"])
    try:
        engine_args = EngineArgs.from_cli_args(args)
        changes = cpu.mend(engine_args)
        return LLM.from_engine_args(engine_args), changes
    except (ValueError, RuntimeError, OSError) as error:
        raise VerifyError(cause(error)) from error


def inspect(llm: Any) -> dict[str, Any]:
    """Run a probe batch through a vLLM engine and collect what its workers found.

    Args:
        llm: vllm.LLM, eager, with counterfactual routing configured.

    Returns:
        "model", "versions", "cor" (the options), "layers" (judge.LayerVerdict as dictionaries, of every
        worker), "problems" (one line each) and "notes" (what is wrong with the engine next to its routing,
        one line each).

    Raises:
        VerifyError: a worker does not have the plugin.
    """
    from vllm import SamplingParams

    from cor_vllm.serve.process import config_of, scores_of

    config = llm.llm_engine.vllm_config
    options = config_of(config)
    if options is None:
        raise VerifyError("the engine runs without counterfactual routing: is COR_DISABLE set?")
    scores = scores_of(options)
    mode = "static k" if options.static_k else options.mode or scores.config.serving.mode
    vocabulary = config.model_config.get_vocab_size()
    prompts = [
        {"prompt_token_ids": [(7 + 131 * i + 17 * j + j * j) % vocabulary for j in range(PROMPT_TOKENS)]}
        for i in range(PROMPTS)
    ]
    try:
        llm.collective_rpc("cor_probe_begin")
    except (AttributeError, NotImplementedError) as error:  # what vLLM raises for a method that no worker has
        raise VerifyError(f"a worker runs without the plugin cor-vllm ({error})") from error
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS), use_tqdm=False)
    layers = [row for rows in llm.collective_rpc("cor_probe_end") for row in rows]
    problems = [f"{row['name']} (worker {row['worker']}): {p}" for row in layers for p in row["problems"]]
    if not layers:
        problems.append("no MoE layer was found")
    return {
        "model": config.model_config.model,
        "versions": {
            **compat.versions(),
            "python": platform.python_version(), "device": _device(),
        },
        "cor": {"mode": mode, "lambda": scores.config.serving.lambda_}
        | options.model_dump(by_alias=True, exclude_none=True),
        "layers": layers,
        "problems": problems,
        "notes": cpu.warnings(config),
    }  # fmt: skip


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def render(report: dict[str, Any]) -> str:
    """The report as text: Markdown that can be pasted into an issue."""
    layers = report["layers"]
    workers = sorted({row["worker"] for row in layers})
    table = Table(box=box.MARKDOWN)
    for column in ("layer", "kernel", "modular", "router", "k", "tokens", "as expected", "weights off by",
                   "slots changed", "λ=0 is stock"):  # fmt: skip
        table.add_column(column, overflow="fold")
    shown = set()
    for row in layers:
        if row["layer"] in shown and not row["problems"]:
            continue  # the same layer on another rank, and all is well with it
        shown.add(row["layer"])
        table.add_row(
            str(row["layer"]), row["kernel"], "yes" if row["modular"] else "NO", row["router"], str(row["k"]),
            str(row["tokens"]), f"{row['as_expected']:.0%}", f"{row['weights_error']:.1g}",
            f"{row['changed']:.1%}", f"{row['lambda_0']:.0%}",
        )  # fmt: skip
    text = io.StringIO()
    Console(width=150, file=text).print(table)
    head = [
        f"model: {report['model']}",
        "scores: {scores}, sha256 {sha}".format(
            scores=report["cor"]["scores"], sha=report["cor"]["sha256"][:16]
        ),
        "options: " + json.dumps({k: v for k, v in report["cor"].items() if k not in ("scores", "sha256")}),
        "versions: " + ", ".join(f"{name} {value}" for name, value in report["versions"].items()),
        f"Σ k = {sum({row['layer']: row['k'] for row in layers}.values())}",
    ]
    verdict = (
        [f"PROBLEM: {problem}" for problem in report["problems"]]
        if report["problems"]
        else [f"All {len(layers)} layers of {len(workers)} worker(s) are routed as the scores file says."]
    )
    lines = [line.strip() for line in text.getvalue().strip().splitlines()]
    notes = [f"NOTE: {note}" for note in report["notes"]]
    return "\n".join([*head, "", *lines, "", *verdict, *notes])


def main(model: str, scores: str, flags: list[str], as_json: bool) -> int:
    """The command: `verify` with errors as one line on stderr."""
    try:
        return verify(model, scores, flags, as_json)
    except VerifyError as error:
        print(f"cor-vllm: error: {error}", file=sys.stderr)
        return 1
