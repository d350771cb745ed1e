"""The command `cor-vllm`. Heavy modules are imported by the handlers, so that --help is quick."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cor_vllm import __version__, exits
from cor_vllm.arguments import given, path
from cor_vllm.errors import invalid
from cor_vllm.evaluate.command import add_evaluate, add_tune, run_evaluate, run_tune


class Parser(argparse.ArgumentParser):
    """argparse's own says nothing where its help or a version cannot be written."""

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)


Handler = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None: the process's own.

    Returns:
        The exit code (exits.HELP). Usage errors exit with 2.
    """
    return exits.run(lambda: _command(argv))


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options; each command's `handler` runs it."""
    parser = Parser(
        prog="cor-vllm",
        description="Counterfactual routing for mixture-of-experts models served by vLLM.",
        epilog=exits.HELP,
    )
    parser.add_argument("--version", action="version", version=f"cor-vllm {__version__}")
    commands: Any = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_calibrate(commands)
    _add_show(commands)
    _add_plot(commands)
    _add_verify(commands)
    add_evaluate(commands).set_defaults(handler=run_evaluate)
    add_tune(commands).set_defaults(handler=run_tune)
    return parser


def _command(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.handler not in (_verify, run_evaluate, run_tune):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    handler: Handler = args.handler
    try:
        return handler(args)
    except (KeyboardInterrupt, exits.Terminated) as stop:
        if handler in (_calibrate, run_evaluate, run_tune):
            stop.add_note("the same command goes on from where it stopped")
        raise


def _add_calibrate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "calibrate",
        help="measure a model and write a scores file",
        description="Measure how much each expert and each layer of a MoE model matters to hard predictions, "
        "and write the scores file that the server routes by. Loads the model with transformers. Interrupted "
        "runs resume when the same command is given again.",
        argument_default=argparse.SUPPRESS,  # the defaults are CalibrationOptions'
    )
    parser.set_defaults(handler=_calibrate)
    parser.add_argument(
        "model", type=given, metavar="MODEL", help="folder of a transformers checkpoint, or a hub id"
    )
    parser.add_argument("--output", required=True, type=given, metavar="FILE", help="scores file to write")
    _add_text_options(parser)
    _add_method_options(parser)
    _add_budget_options(parser)
    _add_run_options(parser)


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    add = group.add_argument
    add(
        "--corpus",
        type=given,
        metavar="NAME_OR_PATH",
        help="a text file (blank lines between documents), a JSON file of strings or of objects with a "
        "string `text`, or `c4` (C4 validation, streamed; needs the package datasets). JSON, here and below, "
        "is a list or one value a line, whatever the file's name; gzip, byte-order marks, UTF-16 are read; "
        "CSV, Parquet and other forms are refused (default: the corpus that ships with the package)",
    )
    add(
        "--answers",
        type=given,
        metavar="FILE",
        help="a JSON file of objects with strings `question` and `answer`: calibrate on "
        "--num-tokens positions of them, the tokens of the answers being the hard ones; --corpus then only "
        "supplies held-out text (default: none)",
    )
    add(
        "--token-ids",
        type=given,
        metavar="FILE",
        help="a JSON file of lists of token ids: all of them are the calibration sequences, as they are, and "
        "--num-tokens and --seq-len do not apply to them; --corpus then only supplies held-out text, and "
        "without it there is no held-out check (default: none)",
    )
    add(
        "--positions",
        type=given,
        metavar="FILE",
        help="a JSON file with one list per sequence of --token-ids: indexes t, from 0, of the positions (t "
        "predicts token t+1) to use as hard ones instead of those above --hard-percentile (default: none)",
    )
    add("--num-tokens", type=int, metavar="N", help="calibration positions (default: 1000)")
    add("--seq-len", type=int, metavar="N", help="most tokens of a sequence (default: 256)")
    add(
        "--heldout-tokens",
        type=int,
        metavar="N",
        help="positions of other text on which the result is checked; 0: no check (default: 1000)",
    )
    add("--seed", type=int, metavar="N", help="of every random choice (default: 0)")


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    add = group.add_argument
    add(
        "--hard-percentile",
        type=float,
        metavar="P",
        help="positions with a loss above this percentile are hard (default: 90)",
    )
    add(
        "--easy-percentile",
        type=float,
        metavar="P",
        help="positions with a loss below this percentile are easy (default: 10)",
    )
    add("--delta", type=float, metavar="D", help="layer outputs are multiplied by 1 + D (default: 0.1)")
    add(
        "--epsilon",
        type=float,
        metavar="E",
        help="added to the denominator of R_l = S(hard) / (S(easy) + E), nats (default: 1e-6)",
    )
    add(
        "--ablation",
        choices=("backfill", "drop"),
        help="when an expert is taken away, the next-best one moves up, or none does (default: backfill)",
    )
    add(
        "--scope",
        choices=("token", "sequence"),
        help="an expert is taken away at one position, or at all of the sequence (default: token)",
    )
    add(
        "--perturb-scope",
        choices=("sequence", "token"),
        help="a layer's output is scaled at all positions of the sequence, or at one (default: sequence)",
    )
    add(
        "--perturb-target",
        choices=("moe", "layer"),
        help="what is scaled: what the MoE block adds to the residual stream, or the whole stream after the "
        "layer (default: moe)",
    )
    add(
        "--algorithm",
        choices=("sweep", "plain"),
        help="sweep: all interventions in one pass over the layers; plain: one full forward per "
        "intervention, slow, with the same numbers; --scope sequence takes plain, the sweep does not cover "
        "it (default: sweep)",
    )
    add(
        "--shrink",
        action="store_true",
        help="shrink each CEI towards 0 by its own standard error before normalising (default: off)",
    )


def _add_budget_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budget")
    add = group.add_argument
    add(
        "--intensity",
        choices=("ratio", "hard", "marginal"),
        help="what decides a layer's share: R_l, as in the paper; S(hard) alone; or the loss change on hard "
        "positions with one expert more and one fewer, by which single experts move between layers, none "
        "where that change is within its noise; with --budget paper R_l (default: marginal)",
    )
    add(
        "--budget",
        choices=("exact", "paper"),
        help="exact: Σ k_l is exactly layers × top_k, within --k-min and --k-max; paper: each k_l is rounded "
        "by itself, unbounded, and the sum can miss (default: exact)",
    )
    add("--k-min", type=int, metavar="K", help="least experts of a layer (default: top_k // 2, at least 1)")
    add(
        "--k-max",
        type=int,
        metavar="K",
        help="most experts of a layer (default: 2 × top_k, at most all that a token can choose among)",
    )
    add(
        "--tune",
        action="store_true",
        help="choose the served mode and λ, none included, on one half of the held-out positions and report "
        "on the other (default: off: mode full, λ = 0.1)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights; auto: float32 on the CPU, the checkpoint's own elsewhere (default: auto)",
    )
    add(
        "--device",
        metavar="DEVICE",
        help="a torch device, or auto: weights beyond its memory wait in host memory and, beyond that, in "
        "FILE.offload (default: cuda where there is one, else cpu; auto where the weights do not fit)",
    )
    add(
        "--max-memory",
        metavar="SIZE",
        help="what the sweep's activations may take on the device, weights not counted, like 500MB or 4GiB; "
        "what waits for its turn is in host memory (default: 2GB)",
    )
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="go on from FILE.partial, which an interrupted run left (default: --resume)",
    )


def _calibrate(args: argparse.Namespace) -> int:
    import torch
    from pydantic import ValidationError

    from cor_vllm.calibrate.config import CalibrationError, CalibrationOptions
    from cor_vllm.calibrate.pipeline import calibrate
    from cor_vllm.calibrate.show import better_flags, warnings
    from cor_vllm.console import Terminal

    values = {name: value for name, value in vars(args).items() if name not in ("handler", "rest")}
    try:
        options = CalibrationOptions(**values)
    except ValidationError as error:
        where, message, _ = invalid(error)
        option = "".join(f"--{part.replace('_', '-')}: " for part in where)
        raise CalibrationError(option + message) from None
    try:
        scores = calibrate(options, Terminal(stderr=True))
    except torch.OutOfMemoryError:
        raise CalibrationError(
            "the device ran out of memory; try a smaller --max-memory, --dtype bfloat16, a shorter "
            "--seq-len, --device auto or --device cpu"
        ) from None
    for line in warnings(scores):
        print(f"warning: {line}", file=sys.stderr)
    for setting in better_flags(scores):
        print(f"would have done better on the held-out text: {setting}", file=sys.stderr)
    print(f"wrote {options.output}; look at it with: cor-vllm show {options.output}")
    return 0


def _add_show(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "show",
        help="print a scores file",
        description="Print what a scores file holds: R_l, k_l, CEI and dormant experts by layer, how many "
        "slots λ changes, and the held-out check. A dormant expert has less than an even share of the "
        "router's probability, but a CEI in the upper half of its layer and above 0.",
    )
    parser.set_defaults(handler=_show)
    parser.add_argument("scores", type=given, metavar="FILE", help="a scores file")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of tables")


def _show(args: argparse.Namespace) -> int:
    from cor_vllm.calibrate.show import as_json, print_scores
    from cor_vllm.console import Terminal
    from cor_vllm.scores import load

    scores = load(args.scores)
    if args.json:
        print(as_json(scores))
    else:
        print_scores(scores, Terminal())
    return 0


def _add_plot(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "plot",
        help="draw a scores file",
        description="Draw budget (R_l and k_l by layer), cei (CEI against router probability) and coverage "
        "(hard positions per expert), each as PNG and SVG.",
    )
    parser.set_defaults(handler=_plot)
    parser.add_argument("scores", type=given, metavar="FILE", help="a scores file")
    parser.add_argument(
        "--output", required=True, type=path, metavar="DIR", help="folder for the figures; created"
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="L",
        help="decoder layers for the cei figure (default: the four with the most dormant experts)",
    )


def _plot(args: argparse.Namespace) -> int:
    from cor_vllm.calibrate.plots import plot
    from cor_vllm.scores import load

    for figure in plot(load(args.scores), args.output, args.layers):
        print(figure)
    return 0


def _add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "verify",
        help="prove that a server routes as its scores file says",
        description="Load a model in vLLM with its scores file, run a probe batch, and compare every MoE "
        "layer with what the file says, computed independently: expert kernel, router, k_l, the experts that "
        "the kernel was given, their weights, the share of slots changed, and that λ = 0 is vLLM's own "
        "routing. Takes every further flag of vLLM's engine, like --tensor-parallel-size or --cor-mode. Runs "
        "eager. Exit code 3 if any layer is not routed as the file says, 1 if that could not be found out.",
    )
    parser.set_defaults(handler=_verify)
    parser.add_argument("model", type=given, metavar="MODEL", help="as for vllm serve")
    parser.add_argument("--cor-scores", required=True, type=given, metavar="PATH", help="the scores file")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of the report")


def _verify(args: argparse.Namespace) -> int:
    from cor_vllm.verify import main as verify

    return verify(args.model, args.cor_scores, args.rest, args.json)


if __name__ == "__main__":
    sys.exit(main())
