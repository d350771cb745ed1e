"""Checks the routing kernel on this device: prints a table; the exit status is not 0 if something is wrong.

    python -m benchmarks.kernel_check                    on a GPU: all cases, vLLM's ops, CUDA graphs
    python -m benchmarks.kernel_check                    elsewhere: small cases in Triton's interpreter

Every result is compared with the definition in float64. Its ids may differ only if the scores of the two
experts are closer than GAP, because float32 cannot tell them apart. vLLM's ops are held to the same, if the
installed vLLM has them and they take the case. What needs a GPU is reported as such, not as passed.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import graph_check
from benchmarks.common.ratios import aim
from benchmarks.common.results import device_name, markdown, run_folder, write_rows
from benchmarks.common.routing_cases import NEEDS_GPU, PASSED, Case, Inputs, difference, kernel

NOT_TAKEN = "not taken"


def cases(small: bool) -> Iterator[Case]:
    """The shapes of the models, and cases that differ from them in one thing each."""
    shapes = ((8, 4),) if small else ((128, 8), (128, 12), (32, 4), (64, 6), (256, 8))
    sizes = (1, 5) if small else (1, 16, 256, 4096)
    for experts, top_k in shapes:
        yield from (Case(tokens, experts, top_k) for tokens in sizes)
    tokens, experts, top_k = (12, 8, 3) if small else (300, 128, 8)
    for dtype in (torch.float16, torch.float32):
        yield Case(tokens, experts, top_k, dtype=dtype)
    for changes in (
        {"renormalize": False}, {"scale": 2.5}, {"bias": "none"}, {"scoring": "sigmoid"},
        {"content": "ties", "bias": "none"}, {"content": "ties"}, {"bias": "-inf"}, {"bias": "negative"},
        {"content": "not finite"}, {"content": "not finite", "bias": "none"},
        {"content": "not finite", "scoring": "sigmoid"}, {"padding": True}, {"ids": torch.int64},
        {"padding": True, "ids": torch.int64, "content": "not finite"},
    ):  # fmt: skip
        yield Case(tokens, experts, top_k, **changes)
    yield Case(tokens, 6 if small else 60, 4, scoring="softmax")
    yield Case(tokens, experts, experts if small else 24)
    yield Case(tokens, experts, 1)
    groups = Case(tokens, 8, 3, groups=(4, 2)) if small else Case(tokens, 256, 8, groups=(8, 4))
    yield from (groups, replace(groups, scoring="sigmoid", scale=2.5))


def vllm_op(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor] | None:
    """vLLM's answer, or None if none of its ops takes the case.

    Not all versions of its ops know padding rows. They go wrong if fewer than k experts have a score above
    −10000, which is their mark for a winner, and they order rows that are not finite in their own way.
    """
    if case.padding or case.content == "not finite" or case.bias in ("-inf", "negative"):
        return None
    if case.groups != (1, 1) and case.scoring != "sigmoid":
        return None
    if case.scale != 1 and case.scoring != "sigmoid":
        return None
    from vllm import _custom_ops as ops

    if case.groups != (1, 1):
        return ops.grouped_topk(
            inputs.logits, *case.groups, case.top_k, case.renormalize, case.scale, inputs.bias, 1
        )
    shape, device = (case.tokens, case.top_k), inputs.logits.device
    weights = torch.empty(shape, dtype=torch.float32, device=device)
    ids = torch.empty(shape, dtype=case.ids, device=device)
    rows = torch.empty(shape, dtype=torch.int32, device=device)
    if case.scoring == "sigmoid":
        ops.topk_sigmoid(weights, ids, rows, inputs.logits, case.renormalize, inputs.bias, case.scale)
    else:
        ops.topk_softmax(weights, ids, rows, inputs.logits, case.renormalize, inputs.bias)
    return weights, ids


def check(case: Case, device: str) -> dict[str, Any]:
    """Make one row of the table: the kernel and vLLM's op against the definition."""
    inputs = Inputs.of(case, device)
    row = {"check": case.title(), "kernel": verdict(lambda: kernel(case, inputs), case, inputs)}
    if device == "cpu":
        return row | {"vllm op": NEEDS_GPU}
    return row | {"vllm op": verdict(lambda: vllm_op(case, inputs), case, inputs)}


def verdict(answer: Any, case: Case, inputs: Inputs) -> str:
    try:
        result = answer()
    # A kernel or op that fails is one cell of the table, and the program's exit code; the other checks go on.
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    if result is None:
        return NOT_TAKEN
    return difference(case, inputs, *result) or PASSED


def main() -> int:
    """Run all checks; 0 if each check of the kernel passed or could not be made here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for checks.csv (default: in results/)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, by the first case
    rows = []
    for case in cases(small=device == "cpu"):
        rows.append(check(case, device))
        print(f"  {rows[-1]['kernel']}: {case.title()}", file=sys.stderr)
    rows += [{"check": name, "kernel": result} for name, result in graph_check.run(device)]
    print(markdown(rows))
    path = write_rows("checks", rows, device_name(device), args.output or run_folder(device))
    failed = [row["check"] for row in rows if row["kernel"] not in (PASSED, NEEDS_GPU)]
    passed = sum(row["kernel"] == PASSED for row in rows)
    unequal = [row for row in rows if row.get("vllm op", PASSED) not in (PASSED, NEEDS_GPU, NOT_TAKEN)]
    print(f"\n{passed} of {len(rows)} checks passed on {device}, {len(failed)} failed; wrote {path.name}")
    verdict_of = "missed" if failed else "met"
    print(aim(f"routing step right on {device}", verdict_of, f"{len(failed)} of {len(rows)} checks failed"))
    print(f"vLLM's ops differ from the definition, or refuse, in {len(unequal)} of the cases that they take.")
    for name in failed:
        print(f"FAILED: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
