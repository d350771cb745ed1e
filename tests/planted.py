"""A last MoE layer with a planted misrouting: the router swaps the experts of two classes of tokens.

Class c's tokens have the mean μ_c, and expert e alone lifts the logit of token e. The router's rows are the
means, with rows 0 and 1 swapped: tokens of classes 0 and 1 go to the wrong expert.
"""

from dataclasses import dataclass

import torch

from cor_vllm.calibrate.model.router import Router
from cor_vllm.calibrate.reroute.problem import Problem
from cor_vllm.kernels.scoring import Scoring

EXPERTS, TOP_K, HIDDEN, VOCABULARY = 8, 2, 32, 16
PLANTED = 2  # classes below it are misrouted


@dataclass(frozen=True, eq=False)
class PlantedLast:
    """Experts that return one vector each, and a head without a norm."""

    experts: torch.Tensor  # [N, D]
    head: torch.Tensor  # [V, D]

    @property
    def device(self) -> torch.device:
        return self.head.device

    def expert_outputs(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.experts[ids]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.head.T


def planted(tokens: int, wrong_labels: float = 0.0, swapped: bool = True) -> tuple[Problem, torch.Tensor]:
    """Make the problem, and the class of each of its `tokens` [P].

    Args:
        wrong_labels: share of the targets that are random instead of the class.
        swapped: False: every token goes to its own expert.
    """
    draw = torch.Generator().manual_seed(0)
    means = torch.linalg.qr(torch.randn(HIDDEN, EXPERTS, generator=draw)).Q.T
    head = torch.randn(VOCABULARY, HIDDEN, generator=draw) * (9 / HIDDEN) ** 0.5
    rows = 4 * means
    if swapped:
        rows = rows[[1, 0, *range(2, EXPERTS)]]
    classes = torch.randint(EXPERTS, (tokens,), generator=draw)
    targets = classes.clone()
    wrong = torch.rand(tokens, generator=draw) < wrong_labels
    targets[wrong] = torch.randint(VOCABULARY, (int(wrong.sum()),), generator=draw)
    problem = Problem(
        x=means[classes] + 0.15 * torch.randn(tokens, HIDDEN, generator=draw),
        residual=0.2 * torch.randn(tokens, HIDDEN, generator=draw),
        targets=targets,
        documents=torch.arange(tokens),
        keys=torch.arange(tokens) * 7919,
        router=Router(TOP_K, Scoring("softmax", True, correction_bias=torch.zeros(EXPERTS))),
        weight=rows,
        bias=None,
        layer=0,
        eligible=EXPERTS,
        last=PlantedLast(1.2 * head[:EXPERTS], head),
    )
    return problem, classes
