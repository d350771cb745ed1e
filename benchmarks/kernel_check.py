"""Is the routing kernel right on this device? A table, and a non-zero exit status where something is wrong.

    python -m benchmarks.kernel_check                    on a GPU: all cases, vLLM's ops, CUDA graphs
    python -m benchmarks.kernel_check                    elsewhere: small cases in Triton's interpreter

Every result is compared with the definition in float64. Its ids may be others only where the scores of the
two experts are closer than GAP, as float32 cannot tell them apart; vLLM's ops, where the installed vLLM has
them and they take the case, are held to the same. What needs a GPU is reported as such, not as passed.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ratios import aim
from benchmarks.results import device_name, markdown, run_folder, write_rows

GAP = 2e-6
RTOL = 1e-5
PASSED, NEEDS_GPU, NOT_TAKEN = "passed", "needs a GPU", "not taken"


@dataclass(frozen=True)
class Case:
    """One input and the options of the routing step."""

    tokens: int
    experts: int
    top_k: int
    content: str = "random"
    dtype: torch.dtype = torch.bfloat16
    scoring: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    bias: str = "random"
    groups: tuple[int, int] = (1, 1)
    padding: bool = False
    ids: torch.dtype = torch.int32

    def title(self) -> str:
        said = [f"T={self.tokens} N={self.experts} k={self.top_k}", str(self.dtype).removeprefix("torch.")]
        default = Case(0, 0, 0)
        for name in ("content", "scoring", "renormalize", "scale", "bias", "groups", "padding", "ids"):
            if (value := getattr(self, name)) != getattr(default, name):
                said.append(f"{name}={str(value).removeprefix('torch.')}")
        return " ".join(said)


@dataclass(frozen=True, eq=False)
class Inputs:
    """[T, N] logits, [N] bias or None, [T] padding rows or None, by a seed."""

    logits: torch.Tensor
    bias: torch.Tensor | None
    padding: torch.Tensor | None

    @classmethod
    def of(cls, case: Case, device: str, seed: int = 0) -> "Inputs":
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(case.tokens, case.experts, generator=generator) * 2
        if case.content == "ties":
            logits = (logits / 2).round()
        if case.content == "not finite":
            _spoil(logits)
        bias = torch.rand(case.experts, generator=generator) * 0.1
        if case.bias == "-inf":
            bias[case.top_k // 2 :] = -torch.inf  # fewer than k experts are left
        if case.bias == "negative":
            bias -= 20_000
        padding = torch.rand(case.tokens, generator=generator) < 0.3 if case.padding else None
        return cls(
            logits.to(case.dtype).to(device),
            None if case.bias == "none" else bias.to(device),
            None if padding is None else padding.to(device),
        )


def _spoil(logits: torch.Tensor) -> None:
    """Rows all NaN, +inf or −inf, rows partly so, and one far beyond what exp() takes."""
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        logits[row] = value
        logits[row + 3, 1::2] = value
        logits[row + 6, 0] = value
    logits[9] *= 1e4


def cases(small: bool) -> Iterator[Case]:
    """The shapes of the models, and one departure from them at a time."""
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


def define(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and scores [T, N] in float64; experts of dropped groups rank after all others."""
    logits = inputs.logits.cpu().double()
    probs = logits.softmax(-1) if case.scoring == "softmax" else logits.sigmoid()
    probs = probs.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    scores = probs if inputs.bias is None else probs + inputs.bias.cpu().double()
    groups, kept = case.groups
    if kept < groups:
        two_best = scores.view(case.tokens, groups, -1).topk(2).values.sum(-1)
        order = two_best.sort(dim=-1, descending=True, stable=True).indices
        dropped = torch.ones_like(two_best).scatter(1, order[:, :kept], 0.0)
        scores = scores - 1e3 * dropped.repeat_interleave(case.experts // groups, dim=1)
    return probs, scores


def difference(case: Case, inputs: Inputs, weights: torch.Tensor, ids: torch.Tensor) -> str:
    """What is wrong with a result, or ""."""
    weights, ids = weights.cpu().double(), ids.cpu().long()
    if inputs.padding is not None:
        padding = inputs.padding.cpu()
        if not ((ids[padding] == -1).all() and (weights[padding] == 0).all()):
            return "padding rows are not (−1, 0)"
        rest = Inputs(inputs.logits[~inputs.padding], inputs.bias, None)
        left = replace(case, tokens=int((~padding).sum()), padding=False)
        return difference(left, rest, weights[~padding], ids[~padding])
    if ids.min() < 0 or ids.max() >= case.experts:
        return f"ids from {int(ids.min())} to {int(ids.max())}"
    if (ids.sort(dim=-1).values.diff(dim=-1) == 0).any():
        return "an expert twice in a row"
    probs, scores = define(case, inputs)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, : case.top_k]
    if case.content == "ties" and inputs.bias is None and not torch.equal(ids, order):
        return "ties do not go to the lowest id"
    # Sorted by rank, since an op may leave the order of its k open.
    got = scores.gather(1, ids).sort(dim=-1, descending=True).values
    # Scores are only as exact as float32 is at their size.
    allowed = GAP + scores.gather(1, order).nan_to_num(neginf=0.0).abs() * 1e-7
    wrong = ((got - scores.gather(1, order)).abs() > allowed).any(dim=-1).sum()
    if wrong:
        return f"other experts in {int(wrong)} rows"
    expected = probs.gather(1, ids)
    if case.renormalize:
        expected = expected / expected.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    worst = ((weights - expected * case.scale).abs() / (expected * case.scale).abs().clamp_min(1e-30)).max()
    # Below the normal float32 a probability may be flushed to zero.
    exact = torch.isclose(weights, expected * case.scale, rtol=RTOL, atol=1e-30)
    return "" if exact.all() else f"weights off by a factor of up to {worst:.1e}"


def kernel(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton kernel's answer."""
    from cor_vllm.kernels.dispatch import cor_topk

    return cor_topk(
        inputs.logits, inputs.bias, case.top_k, case.renormalize, case.scoring, case.scale, "triton",
        num_expert_group=case.groups[0], topk_group=case.groups[1], is_padding=inputs.padding,
        indices_type=case.ids,
    )  # fmt: skip


def vllm_op(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor] | None:
    """vLLM's answer, or None where none of its ops takes the case.

    Its ops know no padding rows in all versions, go wrong where fewer than k experts have a score above
    −10000 (that is their mark for a winner), and order rows that are not finite in their own way.
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
    """One row of the table: the kernel and vLLM's op against the definition."""
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
    """0 where every check of the kernel passed or could not be made here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for checks.csv (default: in results/)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, by the first case
    from benchmarks import graph_check

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
