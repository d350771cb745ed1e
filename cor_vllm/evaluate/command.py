"""`cor-vllm evaluate` and `cor-vllm tune`: their flags, and from flags to a table. Imports nothing heavy."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from cor_vllm.commands.arguments import given, path

TABLE = "table.md"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """The command `evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="measure whether counterfactual routing helps on benchmarks",
        description="Run benchmarks of lm-evaluation-harness under several routings on the same items, and "
        "print a table of paired differences with intervals, corrected p-values and the noise of a repeat. "
        "Every further flag of vLLM's engine is passed on to it, like --tensor-parallel-size. Interrupted "
        "runs go on when the same command is given again. Needs the packages of cor-vllm[evaluate].",
    )
    _add_common(parser)
    _add_conditions(parser)
    add = parser.add_argument
    add(
        "--server",
        action="append",
        default=[],
        metavar="NAME=URL",
        type=_pair,
        help="instead of loading the model: an OpenAI-compatible server that runs already; the table has one "
        "row for each. MODEL then gives the tokenizer; call the one without counterfactual routing "
        "`standard`. A server whose row has the name of a condition must say of itself that it routes so",
    )
    add(
        "--served-name",
        type=given,
        metavar="NAME",
        help="the name by which the servers know the model (default: the first one that each has)",
    )
    return parser


def _add_conditions(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--also",
        action="append",
        default=[],
        metavar="NAME=FILE",
        type=_pair,
        help="a further scores file, whose conditions are named layer@NAME, expert@NAME, full@NAME …: for "
        "other choices of the calibration. Names that differ in a number at the end alone, like facts0 and "
        "facts1, are draws of one calibration: the table also has their mean",
    )
    add(
        "--cor-router",
        metavar="FILE",
        type=path,
        help="a router file of cor-vllm reroute, next to --cor-scores or without it. It adds the row router, "
        "with that router, and the rows router-random-0 and so on, each with a random router that is as far "
        "from the model's own. If a scores file was measured with that router, its rows run with it, too. "
        "The rows of other scores files, and standard, run with the model's own router",
    )
    add(
        "--router-draws",
        type=int,
        default=3,
        metavar="N",
        help="how many random routers are drawn, each for a condition of its own (default: %(default)s)",
    )
    add("--cor-lambda", type=float, metavar="L", help="λ of expert and full (default: the file's)")
    add(
        "--conditions",
        metavar="LIST",
        help="comma-separated: names, patterns with *, or quick (standard twice, expert, full, and "
        "full with permuted CEI, and the rows that --cor-router adds), paper, all (default: quick)",
    )
    add(
        "--permutations",
        type=int,
        default=3,
        metavar="N",
        help="how many times the CEI of each file is permuted, each time for a condition of its own "
        "(default: %(default)s)",
    )
    add("--list-conditions", action="store_true", help="print the conditions of these files, and stop")


def add_tune(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """The command `tune`."""
    parser = commands.add_parser(
        "tune",
        help="choose mode and λ on one half of a benchmark's items, report on the other",
        description="Run benchmarks under modes full and expert at several λ, under mode layer and under "
        "stock routing; choose the best by the mean score over one half of the items, drawn by --seed, and "
        "report it on the other half, which took no part in the choice. Results are kept and reused as by "
        "evaluate.",
    )
    _add_common(parser)
    parser.add_argument(
        "--grid", default="0.01,0.02,0.05,0.1,0.2", metavar="LIST", help="λ to try (default: %(default)s)"
    )
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=given, metavar="MODEL", help="folder of a transformers checkpoint, or a hub id")
    add("--cor-scores", metavar="FILE", type=path, help="the scores file")
    add("--output", required=True, type=path, metavar="DIR", help="folder for results and table; created")
    add(
        "--tasks",
        default="factual",
        metavar="LIST",
        help="comma-separated: factual (truthfulqa_mc1, truthfulqa_mc2, truthfulqa_gen, factor_news, "
        "factor_wiki, triviaqa), general (arc_challenge, arc_easy, mmlu, gsm8k), mmlu (mmlu_humanities, "
        "mmlu_social_sciences, mmlu_stem, mmlu_other), paper (factual and general), names of these, or the "
        "path of a harness task's YAML (default: factual)",
    )
    add(
        "--data",
        type=path,
        metavar="DIR",
        help="folder that mirrors the hub: DIR/truthfulqa/truthful_qa and so on hold the data sets; what it "
        "lacks comes from the hub. FACTOR is on no hub: DIR/factor/news/news_factor.csv from "
        "github.com/AI21Labs/factor",
    )
    add(
        "--limit",
        type=int,
        metavar="N",
        help="at most so many items of each task, drawn by --seed (default: all)",
    )
    add(
        "--backend",
        choices=("vllm", "transformers"),
        help="what runs the model: vllm starts one engine for each condition, as it would be served; "
        "transformers also has the baselines DoLa and ITI and the entropy gates (default: vllm)",
    )
    add(
        "--max-model-len",
        type=int,
        metavar="N",
        help="tokens that a prompt and its answer have together, on every back end; longer prompts lose "
        "their beginning, and how many is said (default: what the model or the shortest server takes)",
    )
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="rows per forward with transformers, prompts per request with servers (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="dtype of the weights, as calibrate and vllm serve take it (default: auto)",
    )
    add("--device", type=given, help="torch device, with --backend transformers only, as calibrate takes it")
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of the draws, the permutations and the bootstrap (default: 0)",
    )


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}: must be NAME=…")
    return name, value


def run_evaluate(args: argparse.Namespace) -> int:
    """Run, write the table and print it."""
    from cor_vllm.evaluate.benchmarks import EvaluationError
    from cor_vllm.evaluate.options import available

    servers = _unique("--server", args.server)
    if servers:
        for flag, value in (
            ("--backend", args.backend), ("--conditions", args.conditions), ("--dtype", args.dtype),
            ("--list-conditions", args.list_conditions),
        ):  # fmt: skip
            if value:
                raise EvaluationError(f"{flag}: means nothing with --server, whose servers run already")
    elif args.served_name:
        raise EvaluationError("--served-name: is of --server, which is not given")
    options = _options(
        args,
        also=_unique("--also", args.also),
        servers=servers,
        served_name=args.served_name,
        conditions=tuple((args.conditions or "quick").split(",")),
        permutations=args.permutations,
        router=args.cor_router,
        router_draws=args.router_draws,
        lambda_=args.cor_lambda,
    )
    if args.list_conditions:
        for condition in available(options):
            print(f"{condition.name}: {condition.description}")
        return 0
    with _run():
        text = _evaluated(options)
    print(text)
    return 0


def _evaluated(options: Any) -> str:
    from rich.console import Console

    from cor_vllm.evaluate.pareto import pareto
    from cor_vllm.evaluate.pipeline import evaluate
    from cor_vllm.evaluate.report import render, silent, warnings

    found = evaluate(options, Console(stderr=True))
    text = render(found)
    (options.output / TABLE).write_text(text, encoding="utf-8")
    for line in warnings(found, silent(found)):
        print(f"warning: {line}", file=sys.stderr)
    for file in pareto(found, options.output):
        print(file, file=sys.stderr)
    return text


def run_tune(args: argparse.Namespace) -> int:
    """Run, choose, and report on the items that took no part."""
    from rich.console import Console

    from cor_vllm.evaluate.tuning import parse_grid, tune

    grid = parse_grid(args.grid)
    options = _options(args)
    with _run():
        text = tune(options, grid, Console(stderr=True))
        (options.output / TABLE).write_text(text, encoding="utf-8")
    print(text)
    return 0


@contextlib.contextmanager
def _run() -> Iterator[None]:
    """Around what measures: stdout is for the table, no process outlives this one, OSErrors are one line.

    vLLM, its libraries in C and the processes that they start write to file descriptor 1, whatever Python's
    own sys.stdout is.

    Raises:
        EvaluationError: a file cannot be read or written.
    """
    from cor_vllm.commands import lifetime
    from cor_vllm.evaluate.benchmarks import EvaluationError

    lifetime.guard()
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except OSError as error:
        raise EvaluationError(str(error)) from error
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _unique(flag: str, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """NAME=… by name; a name that is there twice would lose one of them."""
    from cor_vllm.evaluate.benchmarks import EvaluationError

    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found:
            raise EvaluationError(f"{flag} {name}=…: is there twice; give each its own name")
        found[name] = value
    return found


def _options(args: argparse.Namespace, **more: Any) -> Any:
    from cor_vllm.evaluate.benchmarks import EvaluationError
    from cor_vllm.evaluate.options import EvaluateOptions

    served = bool(more.get("servers"))
    backend = "server" if served else args.backend or "vllm"
    if args.rest and backend != "vllm":
        raise EvaluationError(f"{' '.join(args.rest)}: unknown, and there is no engine to pass it to")
    if args.device and backend != "transformers":
        raise EvaluationError("--device: is of --backend transformers")
    dtype = args.dtype or "auto"
    return EvaluateOptions.of(
        model=args.model,
        output=args.output,
        scores=args.cor_scores,
        backend=backend,
        tasks=tuple(args.tasks.split(",")),
        data=args.data,
        limit=args.limit,
        batch_size=args.batch_size,
        max_model_len=args.max_model_len,
        seed=args.seed,
        dtype=dtype,
        device=args.device,
        engine=_engine_arguments(args.rest, args.model, args.seed, dtype),
        **more,
    )


def _engine_arguments(flags: list[str], model: str, seed: int, dtype: str) -> dict[str, Any]:
    """vLLM's flags as arguments of vllm.LLM: those that were given, under vLLM's own parser."""
    if not flags:
        return {}
    with _run():
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        from cor_vllm import register
        from cor_vllm.commands.engine_flags import Own, given

        own = {
            "model": Own(model, f"what is measured, and named in the table, is {model}"),
            "tokenizer": Own(model, f"prompts are made with {model}'s own tokenizer, as on every back end"),
            "served_model_name": Own((), f"the table names {model}"),
            "seed": Own(seed, "give --seed to this command itself"),
            "dtype": Own(dtype, "give --dtype to this command itself"),
            "max_model_len": Own((), "give --max-model-len to this command itself"),
            "logprobs_mode": Own("raw_logprobs", "what is scored are log-probabilities"),
            "cor_": Own(
                (), "each row of the table has its own routing; choose rows, by --conditions or --grid"
            ),
        }  # fmt: skip
        register()  # vLLM's parser then knows the --cor-… flags, which are refused by name
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="cor-vllm evaluate"))
        return given(parser, flags, own)
