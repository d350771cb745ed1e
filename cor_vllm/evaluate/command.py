"""`cor-vllm evaluate` and `cor-vllm tune`: their flags, and from flags to a table. Imports nothing heavy."""

import argparse
import sys
from pathlib import Path
from typing import Any

from cor_vllm.arguments import given, path

TABLE = "table.md"


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
    add = parser.add_argument
    add(
        "--also",
        action="append",
        default=[],
        metavar="NAME=FILE",
        type=_pair,
        help="a further scores file, whose conditions are named layer@NAME, expert@NAME, full@NAME …: for "
        "other choices of the calibration",
    )
    add(
        "--conditions",
        default="quick",
        metavar="LIST",
        help="comma-separated: names, patterns with *, or quick (standard twice, expert, full, and "
        "full with permuted CEI), paper, all (default: quick)",
    )
    add(
        "--permutations",
        type=int,
        default=3,
        metavar="N",
        help="of the CEI of each file, each a condition (default: %(default)s)",
    )
    add("--list-conditions", action="store_true", help="print the conditions of these scores files, and stop")
    add(
        "--server",
        action="append",
        default=[],
        metavar="NAME=URL",
        type=_pair,
        help="instead of loading the model: an OpenAI-compatible server that runs already; the table has one "
        "row for each. MODEL then gives the tokenizer; call the one without counterfactual routing "
        "`standard`",
    )
    add("--served-name", metavar="NAME", help="what the servers call the model (default: each one's first)")
    return parser


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
    add("--limit", type=int, metavar="N", help="items per task, drawn by --seed (default: all)")
    add(
        "--backend",
        choices=("vllm", "transformers"),
        default="vllm",
        help="what runs the model: vllm, an engine per condition, as served; or transformers, which also has "
        "the baselines DoLa and ITI and the entropy gates (default: vllm)",
    )
    add("--cor-lambda", type=float, metavar="L", help="λ of expert and full (default: the file's)")
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="N",
        help="rows per forward with transformers, prompts per request with servers (default: %(default)s)",
    )
    add("--dtype", default="auto", help="as for calibrate and vllm (default: auto)")
    add("--device", help="with transformers: as for calibrate")
    add("--seed", type=int, default=0, help="of draws, permutations and bootstrap (default: 0)")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}: must be NAME=…")
    return name, value


def run_evaluate(args: argparse.Namespace) -> int:
    """Run, write the table and print it."""
    from rich.console import Console

    from cor_vllm.evaluate.pareto import pareto
    from cor_vllm.evaluate.pipeline import available, evaluate
    from cor_vllm.evaluate.report import render

    options = _options(
        args,
        also=dict(args.also),
        servers=dict(args.server),
        served_name=args.served_name,
        conditions=tuple(args.conditions.split(",")),
        permutations=args.permutations,
    )
    if args.list_conditions:
        for condition in available(options):
            print(f"{condition.name}: {condition.description}")
        return 0
    found = evaluate(options, Console(stderr=True))
    for file in pareto(found, options.output):
        print(file, file=sys.stderr)
    return _finish(options.output, render(found))


def run_tune(args: argparse.Namespace) -> int:
    """Run, choose, and report on the items that took no part."""
    from rich.console import Console

    from cor_vllm.evaluate.tuning import tune

    grid = [float(value) for value in args.grid.split(",")]
    options = _options(args)
    return _finish(options.output, tune(options, grid, Console(stderr=True)))


def _finish(folder: Path, text: str) -> int:
    (folder / TABLE).write_text(text)
    print(text)
    return 0


def _options(args: argparse.Namespace, **more: Any) -> Any:
    from cor_vllm.evaluate.benchmarks import EvaluationError
    from cor_vllm.evaluate.pipeline import EvaluateOptions

    served = bool(more.get("servers"))
    if args.rest and (args.backend != "vllm" or served):
        raise EvaluationError(f"{' '.join(args.rest)}: unknown, and there is no engine to pass it to")
    return EvaluateOptions(
        model=args.model,
        output=args.output,
        scores=args.cor_scores,
        backend="server" if served else args.backend,
        tasks=tuple(args.tasks.split(",")),
        data=args.data,
        limit=args.limit,
        lambda_=args.cor_lambda,
        batch_size=args.batch_size,
        seed=args.seed,
        dtype=args.dtype,
        device=args.device,
        engine=_engine_arguments(args.rest),
        **more,
    )


def _engine_arguments(flags: list[str]) -> dict[str, Any]:
    """vLLM's flags as arguments of vllm.LLM: those that were given, under vLLM's own parser."""
    if not flags:
        return {}
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="cor-vllm evaluate"))
    given, default = vars(parser.parse_args(flags)), vars(parser.parse_args([]))
    return {name: value for name, value in given.items() if value != default[name]}
