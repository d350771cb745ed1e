"""`cor-vllm reroute`: its flags, and the way from flags to a router file. Imports nothing heavy."""

import argparse
import sys

from cor_vllm.calibrate.routes.command import add_draw_options, add_text_options
from cor_vllm.commands.arguments import given


def add_reroute(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """The command `reroute`."""
    parser = commands.add_parser(
        "reroute",
        help="train the router of the last layer and write a router file",
        description="Train the router of the last MoE layer to take routes that give the text a lower loss, "
        "and write the router file that the server takes with --cor-router. Nothing else of the model "
        "changes. Documents are split: one part trains, one chooses among several ways to train (to leave "
        "the router alone is one of them), and one is only used to report what came of it. Interrupted runs "
        "resume when the same command is given again.",
        argument_default=argparse.SUPPRESS,  # the defaults are RerouteOptions'
    )
    parser.add_argument(
        "model", type=given, metavar="MODEL", help="folder of a transformers checkpoint, or a hub id"
    )
    parser.add_argument("--output", required=True, type=given, metavar="FILE", help="router file to write")
    add_text_options(parser, num_tokens=20_000)
    _add_training_options(parser)
    add_draw_options(parser.add_argument_group("routes"))
    _add_run_options(parser)
    return parser


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training").add_argument
    add(
        "--objective",
        choices=("auto", "epo", "margin", "ce"),
        help="epo prefers the best of the drawn routes to the router's own; margin moves the router until it "
        "takes that route; ce is the usual gradient of the loss, through the weights of the experts that "
        "run. auto tries all three. Each is written only if it lowers the loss on the part that chooses, "
        "else the model's own router is (default: auto)",
    )
    add(
        "--learning-rate",
        type=float,
        metavar="R",
        help="learning rate (default: 3e-4; with --objective auto 3e-5, too)",
    )
    add(
        "--kl",
        type=float,
        metavar="W",
        help="weight of a penalty, the divergence of the router's probabilities from the model's own "
        "(default: 0; with --objective auto 1, too)",
    )
    add(
        "--tau",
        type=float,
        metavar="T",
        help="tokens with a loss of at most T nats are not trained on (default: 0.1)",
    )
    add("--beta", type=float, metavar="B", help="sharpness of the preference in epo (default: 0.1)")
    add("--batch", type=int, metavar="N", help="tokens of a step (default: 16)")
    add("--epochs", type=int, metavar="N", help="passes over the text (default: 1)")
    add(
        "--debias",
        action="store_true",
        help="subtract from what a route gains the luck of the draw, which is what the best drawn route "
        "gains on next tokens that are drawn from the model itself (default: off)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add(
        "--served-dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype that the server keeps the router in; the weight is rounded to it before it is judged. "
        "auto takes the checkpoint's own, and bfloat16 for float32, as vLLM does (default: auto)",
    )
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the model's weights while training; auto means float32 on the CPU and the "
        "checkpoint's own elsewhere (default: auto)",
    )
    add("--device", metavar="DEVICE", help="a torch device (default: cuda if there is one, else cpu)")
    add(
        "--max-memory",
        metavar="SIZE",
        help="if the outputs of all experts at all positions take no more than this, they are kept, which is "
        "faster (default: 2GB)",
    )
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="go on from FILE.partial, which an interrupted run left (default: --resume)",
    )


def run_reroute(args: argparse.Namespace) -> int:
    """Train, write the file, and print what its user should know about it."""
    from cor_vllm.calibrate.config import options_of
    from cor_vllm.calibrate.model.limits import device_memory_errors
    from cor_vllm.calibrate.reroute.options import RerouteOptions
    from cor_vllm.calibrate.reroute.pipeline import reroute
    from cor_vllm.calibrate.reroute.show import print_overlay
    from cor_vllm.commands.console import Terminal

    options = options_of(RerouteOptions, args)
    with device_memory_errors():
        overlay = reroute(options, Terminal(stderr=True))
    print_overlay(overlay, Terminal())
    print(f"wrote {options.output}; serve it with: vllm serve {options.model} --cor-router {options.output}")
    if overlay.config.training.objective == "none":
        print("no way to train it lowered the loss: the file holds the model's own router", file=sys.stderr)
    return 0
