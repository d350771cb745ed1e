"""`cor-vllm analyse`: its flags, and the way from flags to an analysis. Imports nothing heavy."""

import argparse

from cor_vllm.commands.arguments import given


def add_analyse(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """The command `analyse`."""
    parser = commands.add_parser(
        "analyse",
        help="ask whether a model's experts are misrouted",
        description="Compare the route of each token, the set of experts that the router chose, with sampled "
        "routes of as many experts, by the log-probability that they give to the next token. Everything is "
        "done a second time for next tokens that are drawn from the model itself. For those no other route "
        "is better on average, so what the sampled routes gain there is luck of the draw. The result is the "
        "excess: what they gain on the text beyond that. Interrupted runs resume when the same command is "
        "given again.",
        argument_default=argparse.SUPPRESS,  # the defaults are AnalysisOptions'
    )
    parser.add_argument(
        "model", type=given, metavar="MODEL", help="folder of a transformers checkpoint, or a hub id"
    )
    parser.add_argument(
        "--output",
        required=True,
        type=given,
        metavar="DIR",
        help="folder for analysis.json and pictures; created",
    )
    add_text_options(parser)
    _add_route_options(parser)
    _add_run_options(parser)
    return parser


def add_text_options(parser: argparse.ArgumentParser, num_tokens: int = 10_000) -> None:
    """The flags that name a text whose tokens are scored (TextOptions); `num_tokens` is the default."""
    add = parser.add_argument_group("text").add_argument
    add(
        "--corpus",
        type=given,
        metavar="NAME_OR_PATH",
        help="a text, all of whose tokens are scored, in the forms that `calibrate --corpus` takes (default: "
        "the corpus that ships with the package)",
    )
    add(
        "--answers",
        type=given,
        metavar="FILE",
        help="a JSON file of objects with strings `question` and `answer`; the tokens of the answers are "
        "scored (default: none)",
    )
    add(
        "--trajectories",
        type=given,
        metavar="FILE",
        help="a JSON file of objects with strings `prompt` and `completion`, which are read as they are, and "
        "true or false as `verified`: whether the completion is right. The tokens of the completions are "
        "scored. Records with the same prompt are one document (default: none)",
    )
    add(
        "--verified",
        choices=("yes", "no", "all"),
        help="which trajectories count: those that are right, those that are wrong, or all (default: yes)",
    )
    add(
        "--token-ids",
        type=given,
        metavar="FILE",
        help="a JSON file of lists of token ids. All their tokens are scored; --num-tokens and --seq-len do "
        "not apply (default: none)",
    )
    add(
        "--num-tokens",
        type=int,
        metavar="N",
        help="positions that are read, questions and prompts included; fewer if the text holds fewer "
        f"(default: {num_tokens})",
    )
    add("--seq-len", type=int, metavar="N", help="most tokens of a sequence of a corpus (default: 256)")
    add("--seed", type=int, metavar="N", help="seed of every random choice (default: 0)")


def add_draw_options(group: argparse._ArgumentGroup) -> None:
    """The flags that say how routes are drawn (DrawOptions)."""
    add = group.add_argument
    add("--routes", type=int, metavar="N", help="routes that are drawn for each token (default: 32)")
    add(
        "--pool",
        type=int,
        metavar="N",
        help="routes are drawn from this many experts of highest score (default: 32, or all if there are "
        "fewer)",
    )
    add(
        "--temperature",
        type=float,
        metavar="T",
        help="1 draws experts in proportion to their scores; higher values draw more alike (default: 1)",
    )


def _add_route_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("routes")
    add = group.add_argument
    add(
        "--layers",
        type=given,
        metavar="WHICH",
        help="the layers whose routes are compared, each on its own: final, all, or numbers of decoder "
        "layers with commas between them (default: final)",
    )
    add(
        "--joint",
        action="store_true",
        help="compare routes that are drawn at all layers together, too (default: off)",
    )
    add_draw_options(group)
    add(
        "--bins",
        type=given,
        metavar="P,P",
        help="the standard route's probability of a token from which the token is confident, and below "
        "which it is fragile; between them it is ambiguous (default: 0.9,0.5)",
    )
    add(
        "--null",
        type=int,
        metavar="N",
        help="next tokens that are drawn from the model at each position (default: 1)",
    )
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="compare routes at no more than N positions, chosen by their probability under the standard "
        "route so that confident, ambiguous and fragile tokens are equally many (default: all)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the weights; auto means float32 on the CPU and the checkpoint's own elsewhere "
        "(default: auto)",
    )
    add(
        "--device",
        metavar="DEVICE",
        help="a torch device, or auto. With auto, weights that do not fit into its memory wait in host "
        "memory or on disk (default: cuda if there is one, else cpu; auto if the weights do not fit)",
    )
    add(
        "--max-memory",
        metavar="SIZE",
        help="memory that activations may take on the device, like 500MB or 4GiB (default: 2GB)",
    )
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="go on from DIR/analysis.json.partial, which an interrupted run left (default: --resume)",
    )
    add(
        "--rows",
        type=given,
        metavar="FILE",
        help="write the measures of each token at each layer, too, as JSON lines (default: none)",
    )
    add("--json", action="store_true", help="print the JSON on stdout instead of the tables")


def run_analyse(args: argparse.Namespace) -> int:
    """Analyse, write the folder, and print what was found."""
    from cor_vllm.calibrate.config import options_of
    from cor_vllm.calibrate.model.limits import device_memory_errors
    from cor_vllm.calibrate.routes.options import AnalysisOptions
    from cor_vllm.calibrate.routes.pipeline import analyse
    from cor_vllm.calibrate.routes.report import print_analysis
    from cor_vllm.commands.console import Terminal

    options = options_of(AnalysisOptions, args)
    with device_memory_errors():
        analysis = analyse(options, Terminal(stderr=True))
    if "json" in args:
        print(analysis.model_dump_json(indent=1))
        return 0
    print_analysis(analysis, Terminal())
    print(f"wrote {options.output}; print it again with: cor-vllm report {options.output}")
    return 0
