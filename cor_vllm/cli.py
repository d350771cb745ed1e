"""The command `cor-vllm`. Heavy modules are imported by the handlers, so that --help is quick."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cor_vllm.calibrate.command import add_calibrate, run_calibrate
from cor_vllm.calibrate.reroute.command import add_reroute, run_reroute
from cor_vllm.calibrate.routes.command import add_analyse, run_analyse
from cor_vllm.commands import exits
from cor_vllm.commands.arguments import given, path
from cor_vllm.evaluate.command import add_evaluate, add_tune, run_evaluate, run_tune
from cor_vllm.evaluate.report_command import add_report, run_report
from cor_vllm.version import __version__


class Parser(argparse.ArgumentParser):
    """A parser that raises if its help or the version cannot be written; argparse's own says nothing."""

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
    add_calibrate(commands).set_defaults(handler=run_calibrate)
    add_analyse(commands).set_defaults(handler=run_analyse)
    add_reroute(commands).set_defaults(handler=run_reroute)
    _add_show(commands)
    _add_plot(commands)
    _add_verify(commands)
    add_evaluate(commands).set_defaults(handler=run_evaluate)
    add_report(commands).set_defaults(handler=run_report)
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
        if handler in (run_analyse, run_calibrate, run_evaluate, run_reroute, run_tune):
            stop.add_note("the same command goes on from where it stopped")
        raise


def _add_show(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "show",
        help="print a scores file or a router file",
        description="Print what a scores file holds: R_l, k_l, CEI and dormant experts by layer, how many "
        "slots λ changes, and the held-out check. A dormant expert has less than an even share of the "
        "router's probability, but a CEI in the upper half of its layer and above 0. Of a router file: how "
        "it was trained, the held-out check, and what became of the routes.",
    )
    parser.set_defaults(handler=_show)
    parser.add_argument("file", type=given, metavar="FILE", help="a scores file or a router file")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of tables")


def _show(args: argparse.Namespace) -> int:
    from cor_vllm import overlay, scores
    from cor_vllm.calibrate.reroute.show import overlay_as_json, print_overlay
    from cor_vllm.calibrate.result.show import as_json, print_scores
    from cor_vllm.commands.console import Terminal

    data = scores.read_bytes(args.file)
    if overlay.is_overlay(data):
        router = overlay.parse(data, args.file)
        print(overlay_as_json(router)) if args.json else print_overlay(router, Terminal())
        return 0
    found = scores.parse(data, args.file)
    print(as_json(found)) if args.json else print_scores(found, Terminal())
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
    from cor_vllm.calibrate.result.plots import plot
    from cor_vllm.scores import load

    for figure in plot(load(args.scores), args.output, args.layers):
        print(figure)
    return 0


def _add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "verify",
        help="prove that a server routes as its files say",
        description="Load a model in vLLM with its scores file, its router file or both, run a probe batch, "
        "and compare what happened with what the files say, computed independently. With a scores file every "
        "MoE layer is compared: expert kernel, router, k_l, the experts that the kernel was given, their "
        "weights, the share of slots changed, and that λ = 0 is vLLM's own routing. With a router file the "
        "router logits of its layer and the experts chosen by them are compared. Takes every further flag of "
        "vLLM's engine, like --tensor-parallel-size or --cor-mode. Runs eager. Exit code 3 if any layer is "
        "not routed as the files say, 1 if that could not be found out.",
    )
    parser.set_defaults(handler=_verify, usage_error=parser.error)
    parser.add_argument(
        "model", type=given, metavar="MODEL", help="the model, as vllm serve takes it: a folder or a hub id"
    )
    parser.add_argument("--cor-scores", type=given, metavar="PATH", help="the scores file")
    parser.add_argument("--cor-router", type=given, metavar="FILE", help="the router file")
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of the report")


def _verify(args: argparse.Namespace) -> int:
    from cor_vllm.verify.command import main as verify

    files = {name: getattr(args, name) for name in ("cor_scores", "cor_router") if getattr(args, name)}
    if not files:
        args.usage_error("one of --cor-scores and --cor-router is required")
    return verify(args.model, files, args.rest, args.json)


if __name__ == "__main__":
    sys.exit(main())
