"""Cases of the routing step: inputs, the definition in float64, and how a result differs from it."""

from dataclasses import dataclass, replace

import torch

GAP = 2e-6  # scores closer than this are one and the same to float32
RTOL = 1e-5
PASSED, NEEDS_GPU = "passed", "needs a GPU"


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
    """Logits [T, N], bias [N] or None, and padding rows [T] or None; a seed makes them."""

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
    """Make rows that are all NaN, +inf or −inf, rows that partly are, and one far beyond what exp() takes."""
    for row, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        logits[row] = value
        logits[row + 3, 1::2] = value
        logits[row + 6, 0] = value
    logits[9] *= 1e4


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
    """Say what is wrong with a result; "" if nothing is."""
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
