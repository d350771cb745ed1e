"""`cor-vllm calibrate`: its flags, and the way from flags to a scores file. Imports nothing heavy."""

import argparse
import sys

from cor_vllm.commands.arguments import given


def add_calibrate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """The command `calibrate`."""
    parser = commands.add_parser(
        "calibrate",
        help="measure a model and write a scores file",
        description="Measure how much each expert and each layer of a MoE model matters to hard predictions, "
        "and write the scores file that the server routes by. Loads the model with transformers. Interrupted "
        "runs resume when the same command is given again.",
        argument_default=argparse.SUPPRESS,  # the defaults are CalibrationOptions'
    )
    parser.add_argument(
        "model", type=given, metavar="MODEL", help="folder of a transformers checkpoint, or a hub id"
    )
    parser.add_argument("--output", required=True, type=given, metavar="FILE", help="scores file to write")
    _add_text_options(parser)
    _add_method_options(parser)
    _add_budget_options(parser)
    _add_run_options(parser)
    return parser


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    add = group.add_argument
    add(
        "--corpus",
        type=given,
        metavar="NAME_OR_PATH",
        help="a text file (blank lines between documents), a JSON file of strings or of objects with a "
        "string `text`, or `c4` (C4 validation, streamed; needs the package datasets). JSON, here and "
        "below, is a list or one value a line, whatever the file's name; gzip, byte-order marks and UTF-16 "
        "are read; CSV, Parquet and other forms are refused (default: the corpus that ships with the "
        "package)",
    )
    add(
        "--answers",
        type=given,
        metavar="FILE",
        help="a JSON file of objects with strings `question` and `answer`. Calibrates on --num-tokens "
        "positions of them; the tokens of the answers are the hard positions. --corpus then only supplies "
        "held-out text (default: none)",
    )
    add(
        "--token-ids",
        type=given,
        metavar="FILE",
        help="a JSON file of lists of token ids. The lists are the calibration sequences as they are: "
        "--num-tokens and --seq-len do not apply to them. --corpus then only supplies held-out text; without "
        "it there is no held-out check (default: none)",
    )
    add(
        "--positions",
        type=given,
        metavar="FILE",
        help="a JSON file with one list for each sequence of --token-ids. A list holds the indexes t, "
        "counted from 0, of the hard positions (position t predicts token t+1). They take the place of "
        "those above --hard-percentile (default: none)",
    )
    add("--num-tokens", type=int, metavar="N", help="calibration positions (default: 1000)")
    add("--seq-len", type=int, metavar="N", help="most tokens of a sequence (default: 256)")
    add(
        "--heldout-tokens",
        type=int,
        metavar="N",
        help="the result is checked on this many positions of other text; 0 means no check (default: 1000)",
    )
    add("--seed", type=int, metavar="N", help="seed of every random choice (default: 0)")


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
    add(
        "--delta",
        type=float,
        metavar="D",
        help="strength of the perturbation that measures a layer: its output is multiplied by 1 + D "
        "(default: 0.1)",
    )
    add(
        "--epsilon",
        type=float,
        metavar="E",
        help="small number of nats that keeps R_l finite: R_l = S(hard) / (S(easy) + E), where S is how much "
        "the loss rises under --delta (default: 1e-6)",
    )
    _add_intervention_options(group)


def _add_intervention_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--ablation",
        choices=("backfill", "drop"),
        help="if an expert is taken away, the next-best one moves up (backfill), or none does (drop) "
        "(default: backfill)",
    )
    add(
        "--scope",
        choices=("token", "sequence"),
        help="an expert is taken away at one position (token), or at all positions of the sequence "
        "(default: token)",
    )
    add(
        "--perturb-scope",
        choices=("sequence", "token"),
        help="a layer's output is scaled at all positions of the sequence, or at one (token) "
        "(default: sequence)",
    )
    add(
        "--perturb-target",
        choices=("moe", "layer"),
        help="moe scales what the MoE block adds to the residual stream, layer the whole stream after the "
        "layer (default: moe)",
    )
    add(
        "--algorithm",
        choices=("sweep", "plain"),
        help="sweep makes all interventions in one pass over the layers. plain makes one full forward for "
        "each intervention: it is slow and gives the same numbers. --scope sequence takes plain, because "
        "the sweep does not cover it (default: sweep)",
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
        help="what decides how many experts a layer gets. ratio: R_l, as in the paper. hard: S(hard) alone. "
        "marginal: the loss change on hard positions with one expert more and with one fewer; single experts "
        "then move between layers, if the gain is beyond its noise. With --budget paper the default is ratio "
        "(default: marginal)",
    )
    add(
        "--budget",
        choices=("exact", "paper"),
        help="exact: Σ k_l is exactly layers × top_k, and each k_l is within --k-min and --k-max. paper: "
        "each k_l is rounded by itself, without bounds, and the sum can miss (default: exact)",
    )
    add("--k-min", type=int, metavar="K", help="fewest experts of a layer (default: top_k // 2, at least 1)")
    add(
        "--k-max",
        type=int,
        metavar="K",
        help="most experts of a layer (default: 2 × top_k, at most all that a token can choose among)",
    )
    add(
        "--tune",
        action="store_true",
        help="choose the mode and λ that are served (or stock routing) on one half of the held-out "
        "positions, and report on the other half (default: off, for mode full, λ = 0.1)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
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
        "memory, and what does not fit there waits in FILE.offload (default: cuda if there is one, else "
        "cpu; auto if the weights do not fit)",
    )
    add(
        "--cor-router",
        type=given,
        metavar="FILE",
        help="a router file of cor-vllm reroute: calibrate the model with that router. The server takes the "
        "scores file together with this router file alone (default: none, the model's own router)",
    )
    add(
        "--max-memory",
        metavar="SIZE",
        help="memory that the sweep's activations may take on the device, like 500MB or 4GiB. Weights do not "
        "count, and what waits for its turn is in host memory (default: 2GB)",
    )
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="go on from FILE.partial, which an interrupted run left (default: --resume)",
    )


def run_calibrate(args: argparse.Namespace) -> int:
    """Calibrate, write the file, and print what its user should know about it."""
    from cor_vllm.calibrate.config import CalibrationOptions, options_of
    from cor_vllm.calibrate.model.limits import device_memory_errors
    from cor_vllm.calibrate.pipeline import calibrate
    from cor_vllm.calibrate.result.show import better_flags, warnings
    from cor_vllm.commands.console import Terminal

    options = options_of(CalibrationOptions, args)
    with device_memory_errors():
        scores = calibrate(options, Terminal(stderr=True))
    for line in warnings(scores):
        print(f"warning: {line}", file=sys.stderr)
    for setting in better_flags(scores):
        print(f"would have done better on the held-out text: {setting}", file=sys.stderr)
    print(f"wrote {options.output}; look at it with: cor-vllm show {options.output}")
    return 0
