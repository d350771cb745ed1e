"""`cor-vllm report`: the report of an evaluation or of an analysis again. Imports nothing heavy."""

import argparse

from cor_vllm.commands.arguments import given, path


def add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """The command `report`."""
    parser = commands.add_parser(
        "report",
        help="print the report of an evaluation or of a route analysis again",
        description="Print the report that cor-vllm evaluate printed, out of the results that it left: for "
        "each benchmark a table with a row for each condition and a column for each quantity. The options "
        "choose what the rows are held against, and which items count. For a folder or JSON file of "
        "cor-vllm analyse it prints that report, which has no options.",
    )
    add = parser.add_argument
    add(
        "runs",
        type=path,
        metavar="DIR|FILE",
        help="the --output folder of evaluate or analyse, a file of --pack, or an analysis.json",
    )
    add(
        "--pack",
        type=path,
        metavar="FILE",
        help="write every item's score under every condition into one compressed CSV file, and stop",
    )
    add(
        "--without",
        type=path,
        metavar="DIR|FILE",
        help="leave out the items that this folder or file has: questions on which a choice was made",
    )
    add(
        "--reference",
        type=given,
        default="standard",
        metavar="ROW",
        help="the row that the others are held against; a mean is a row as well, by its whole name "
        "(default: %(default)s)",
    )
    add(
        "--draws",
        type=given,
        nargs="+",
        metavar="PATTERN",
        help="the conditions that are draws of one calibration, which the last table ranks against the "
        "permutations (default: those that differ in the number of their scores file alone, like "
        "expert@facts0 and expert@facts1, if they have permutations)",
    )
    add(
        "--controls",
        type=given,
        metavar="PATTERN",
        help="the permutations that the draws are ranked against (default: all that are numbered)",
    )
    return parser


def run_report(args: argparse.Namespace) -> int:
    """Print the report, or pack the results.

    Raises:
        EvaluationError: the folder or file holds no results, or they cannot be compared.
    """
    from cor_vllm.calibrate.routes.tables import FILE, read_analysis

    if args.runs.suffix == ".json" or (args.runs / FILE).is_file():
        from cor_vllm.calibrate.routes.report import print_analysis
        from cor_vllm.commands.console import Terminal

        print_analysis(read_analysis(args.runs), Terminal())
        return 0
    from cor_vllm.evaluate import pack
    from cor_vllm.evaluate.report import render

    found = pack.read(args.runs)
    if args.pack is not None:
        pack.write(args.pack, found)
        print(f"{args.pack}: {len(found)} conditions, {args.pack.stat().st_size:,} bytes")
        return 0
    if args.without is not None:
        found = pack.without(found, pack.read(args.without))
    print(render(found, args.reference, args.draws, args.controls))
    return 0
