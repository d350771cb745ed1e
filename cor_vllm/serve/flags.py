"""The --cor-… flags of every vllm subcommand that builds an engine."""

import argparse
import functools
import logging
import multiprocessing
from typing import Any, get_args

from cor_vllm.modes import MODES, ConfigError, Weights

logger = logging.getLogger("vllm.cor")  # below vLLM's own, whose level and format it takes on

# option of additional_config["cor"] → the argument that sets it
_ARGUMENTS = {
    "scores": "cor_scores",
    "router": "cor_router",
    "lambda": "cor_lambda",
    "swap_rate": "cor_swap_rate",
    "mode": "cor_mode",
    "static_k": "cor_static_k",
    "weights": "cor_weights",
    "seed": "cor_seed",
    "admin": "cor_admin",
    "observe": "cor_observe",
}


_WITHOUT_SCORES = {"scores", "router", "admin"}  # options that mean something without a scores file


def add(parser: Any) -> Any:
    """Add the flags as one group; vLLM's own parser is argparse with sugar."""
    group = parser.add_argument_group(
        title="CoRConfig", description="Counterfactual Routing (cor-vllm). COR_DISABLE=1 switches it off."
    )
    group.add_argument(
        "--cor-scores",
        metavar="PATH",
        help="Scores file from `cor-vllm calibrate`. Without it and --cor-router the plugin changes nothing.",
    )
    group.add_argument(
        "--cor-router",
        metavar="FILE",
        help="Router file from `cor-vllm reroute`, which replaces the router of one layer. Works with or "
        "without --cor-scores. With both, the scores must have been measured under this router.",
    )
    _add_routing(group)
    # default None, not False: a flag that was not given must not count as given.
    group.add_argument(
        "--cor-admin",
        action="store_true",
        default=None,
        help="Let POST /v1/cor change lambda and mode, and switch the router of --cor-router, while serving "
        "(see --api-key). Without it the endpoint only reads.",
    )
    group.add_argument(
        "--cor-observe",
        action="store_true",
        default=None,
        help="Count expert slots changed by the routing and distinct experts per layer, on the device, for "
        "/metrics.",
    )
    return parser


def _add_routing(group: Any) -> None:
    """What decides, with a scores file, which experts a token gets."""
    group.add_argument(
        "--cor-lambda",
        type=float,
        metavar="LAMBDA",
        help="Weight of CEI next to the router probability. Default: the scores file's, which is 0.1 unless "
        "it was calibrated with --tune.",
    )
    group.add_argument(
        "--cor-swap-rate",
        type=float,
        metavar="R",
        help="Choose each layer's lambda so that it changes this share of expert slots on the calibration "
        "text, for instance 0.05, in place of one lambda for all.",
    )
    group.add_argument(
        "--cor-mode",
        choices=tuple(MODES),
        help="; ".join(f"{name}: {mode.description}" for name, mode in MODES.items())
        + ". Default: the scores file's, which is full unless it was calibrated with --tune.",
    )
    group.add_argument(
        "--cor-static-k",
        type=int,
        metavar="K",
        help="K experts in every layer by the model's own score (a control).",
    )
    group.add_argument(
        "--cor-weights",
        choices=get_args(Weights),
        help="What weighs the selected experts: the router probability (default), or the fused score, "
        "renormalised.",
    )
    group.add_argument("--cor-seed", type=int, metavar="N", help="Seed of --cor-mode random. Default: 0.")


def merge(args: argparse.Namespace) -> None:
    """Move the flags that were given into `args.additional_config["cor"]`; running it twice is harmless.

    Raises:
        ConfigError: a flag without the file that it needs, or next to an additional_config["cor"] that is not
            a dictionary.
    """
    if getattr(args, "config", None) and multiprocessing.parent_process() is None:
        _warn_of_config(args.config)
    given = {
        option: value
        for option, argument in _ARGUMENTS.items()
        if (value := getattr(args, argument, None)) is not None
    }
    if not given:
        return
    flag = _flag(next(iter(given)))
    additional = dict(args.additional_config or {})
    options = additional.get("cor", {})
    if not isinstance(options, dict):
        raise ConfigError(f'{flag}: "cor" in --additional-config must be a dictionary, got {options!r}')
    options = {**options, **given}
    if "scores" not in options:
        for option in sorted(given.keys() - _WITHOUT_SCORES):
            raise ConfigError(f"{_flag(option)} needs --cor-scores PATH, a file from `cor-vllm calibrate`")
        if "router" not in options:
            raise ConfigError(
                f"{flag} needs --cor-scores PATH, a file from `cor-vllm calibrate`, or --cor-router"
            )
    args.additional_config = {**additional, "cor": options}


def _flag(option: str) -> str:
    return "--" + _ARGUMENTS[option].replace("_", "-")


@functools.cache  # vLLM asks for the same arguments several times
def _warn_of_config(file: str) -> None:
    # vLLM puts the file's content in place of the two arguments `--config FILE`. It does not look for
    # `--config=FILE`, which is left over as an option that nothing reads.
    logger.warning("CoR: vLLM ignores --config=%s and all that is in it: write --config %s", file, file)
