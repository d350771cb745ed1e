"""Trains the weight of the last router by one objective, and keeps the best one that the tuning part saw.

Where the source is silent, this is taken: AdamW without weight decay, a constant rate, gradients clipped to a
norm of 1, tokens in a random order.

Source: arXiv 2605.07260.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from cor_vllm.calibrate.reroute import objectives
from cor_vllm.calibrate.reroute.problem import Problem
from cor_vllm.calibrate.routes.draw import DrawOptions
from cor_vllm.calibrate.routes.noise import mixed
from cor_vllm.calibrate.routes.standard import draw_targets

Objective = Literal["none", "ce", "epo", "margin"]

SCANNED = 256  # tokens whose routes are drawn at one time
CHECK_EVERY = 50  # steps
PATIENCE = 5  # checks without an improvement
NULLS = 8  # null targets of `debias`
KL_TOKENS = 64
CLIP = 1.0
CONFIDENT = 0.9  # tokens that the model's own router gave this probability
CONFIDENT_LOSS = 0.02  # nats; a weight that costs confident tokens more is not taken


@dataclass(frozen=True)
class Candidate:
    """One way to train."""

    objective: Objective
    learning_rate: float = 0.0
    kl: float = 0.0  # weight of the divergence from the model's own router

    def __str__(self) -> str:
        if self.objective == "none":
            return "none"
        return f"{self.objective}, learning rate {self.learning_rate:g}, KL {self.kl:g}"


@dataclass(frozen=True)
class TrainingOptions:
    """What all candidates share."""

    draw: DrawOptions = field(default_factory=DrawOptions)
    tau: float = 0.1  # nats; tokens of a smaller loss are skipped
    beta: float = 0.1
    batch: int = 16  # tokens of a step
    epochs: int = 1
    debias: bool = False
    seed: int = 0
    epsilon: float = 0.0  # nats; smaller gains are rounding
    dtype: torch.dtype = torch.float32  # that the weight is rounded to before it is judged


@dataclass(frozen=True, eq=False)
class Pairs:
    """Tokens for which a drawn route beats the one that the router takes."""

    rows: torch.Tensor  # [R] int64
    better: torch.Tensor  # [R, k] int64, r⁺
    worse: torch.Tensor  # [R, k] int64, r⁻
    gain: torch.Tensor  # [R] float32, Δ = loss(r⁻) − loss(r⁺), nats

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice | torch.Tensor) -> "Pairs":
        return Pairs(*(values[part] for values in vars(self).values()))


@dataclass(frozen=True, eq=False)
class Trained:
    """The best weight of a candidate, the model's own included."""

    weight: torch.Tensor  # [N, D] float32, rounded
    steps: int  # up to this weight; 0 is the model's own
    change: float  # mean loss change on the tuning part, nats


def rounded(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The float32 values that a weight has once it was stored in `dtype`, in memory of their own."""
    return weight.detach().to(dtype).float().clone()


def find_pairs(
    problem: Problem, weight: torch.Tensor, rows: torch.Tensor, options: TrainingOptions, epoch: int = 0
) -> Pairs:
    """Of these rows, those that are hard enough and have a better route among the drawn ones.

    Args:
        problem: the layer.
        weight: [N, D] float32, of the router as it is now.
        rows: [R] int64, at most some hundred.
        options: threshold, draws, `debias`.
        epoch: changes the noise.
    """
    _, losses = problem.executed(weight, rows)
    rows = rows[losses > options.tau]
    if not len(rows):
        nothing = torch.empty(0, problem.router.top_k, dtype=torch.int64)
        return Pairs(rows, nothing, nothing, torch.empty(0))
    keys = mixed(problem.keys[rows], epoch)
    targets = problem.targets[rows, None]
    if options.debias:
        targets = torch.cat([targets, null_targets(problem, weight, rows, keys)], dim=1)
    routes, utility = problem.sampled(weight, rows, options.draw, keys, targets)
    best = utility.max(dim=1)
    gains = best.values - utility[:, 0]
    kept = gains[:, 0] > options.epsilon
    gain = gains[:, 0]
    if options.debias:
        gain = gain - gains[:, 1:].mean(dim=1)
        kept &= gain > 0
    every = torch.arange(len(rows))
    pairs = Pairs(rows, routes.ids[every, best.indices[:, 0]], routes.ids[:, 0], gain)
    return pairs[kept]


@torch.no_grad()
def null_targets(
    problem: Problem, weight: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """[R, NULLS] tokens drawn from what the model predicts with this router, by noise from `keys` [R]."""
    weights, ids = problem.router.route(problem.logits(weight, rows))
    logits = problem.last.logits(problem.hidden(rows, ids.long(), weights))
    return draw_targets(logits.log_softmax(dim=1), keys, NULLS).cpu()


class Training:
    """One candidate's run over the training rows.

    Args:
        problem: the layer.
        train, tuning: [·] int64 rows.
        candidate: objective, rate, KL.
        options: the rest.
        advance: is called with the number of tokens scanned.
    """

    def __init__(
        self,
        problem: Problem,
        train: torch.Tensor,
        tuning: torch.Tensor,
        candidate: Candidate,
        options: TrainingOptions,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self._problem, self._train, self._tuning = problem, train, tuning
        self._candidate, self._options, self._advance = candidate, options, advance
        self._weight = torch.nn.Parameter(problem.weight.clone())
        self._optimizer = torch.optim.AdamW([self._weight], lr=candidate.learning_rate, weight_decay=0.0)
        self._random = torch.Generator().manual_seed(options.seed)
        self._base = problem.executed(problem.weight, tuning)[1].double()
        self._steps = 0
        self._best = Trained(rounded(problem.weight, options.dtype), 0, 0.0)
        self._stale = 0

    def run(self) -> Trained:
        """Train until the text or the patience is used up."""
        for pairs in self._batches():
            self._step(pairs)
            if self._steps % CHECK_EVERY == 0 and self._check():
                return self._best
        if self._steps % CHECK_EVERY:
            self._check()
        return self._best

    def _batches(self) -> Iterator[Pairs]:
        waiting: list[Pairs] = []
        size = self._options.batch
        for epoch in range(self._options.epochs):
            order = self._train[torch.randperm(len(self._train), generator=self._random)]
            for rows in order.split(SCANNED):
                waiting.append(self._found(rows, epoch))
                joined = _joined(waiting)
                whole = len(joined) // size * size
                waiting = [joined[whole:]]
                for start in range(0, whole, size):
                    yield joined[start : start + size]
                self._advance(len(rows))

    def _found(self, rows: torch.Tensor, epoch: int) -> Pairs:
        weight = self._weight.detach()
        if self._candidate.objective != "ce":
            return find_pairs(self._problem, weight, rows, self._options, epoch)
        ids, losses = self._problem.executed(weight, rows)
        hard = losses > self._options.tau
        return Pairs(rows[hard], ids[hard], ids[hard], losses[hard])

    def _step(self, pairs: Pairs) -> None:
        loss = self._loss(pairs)
        if self._candidate.kl:
            some = self._train[torch.randint(len(self._train), (KL_TOKENS,), generator=self._random)]
            before = self._problem.logits(self._problem.weight, some)
            after = self._problem.logits(self._weight, some)
            loss = loss + self._candidate.kl * objectives.divergence(after, before)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([self._weight], CLIP)
        self._optimizer.step()
        self._steps += 1

    def _loss(self, pairs: Pairs) -> torch.Tensor:
        problem = self._problem
        if self._candidate.objective == "ce":
            return objectives.cross_entropy(problem, self._weight, pairs.rows)
        z = problem.logits(self._weight, pairs.rows)
        if self._candidate.objective == "epo":
            before = problem.logits(problem.weight, pairs.rows)
            return objectives.epo(z, before, pairs.better, pairs.worse, pairs.gain, self._options.beta)
        return objectives.margin(_selected_by(problem, z), pairs.better, pairs.gain)

    def _check(self) -> bool:
        """Judge the weight on the tuning part; True if it has not improved for too long."""
        weight = rounded(self._weight, self._options.dtype)
        changes = self._problem.executed(weight, self._tuning)[1].double() - self._base
        change, confident = changes.mean().item(), changes[self._base.neg().exp() >= CONFIDENT]
        self._stale += 1
        if change < self._best.change and not confident.mean() > CONFIDENT_LOSS:  # NaN if there are none
            self._best, self._stale = Trained(weight, self._steps, change), 0
        return self._stale >= PATIENCE


def _selected_by(problem: Problem, z: torch.Tensor) -> torch.Tensor:
    """The logits, whose order a router selects by, unless it adds a correction bias to what they give."""
    if not problem.router.correction_bias.any():
        return z
    return problem.router.scores(problem.router.probabilities(z))


def _joined(parts: list[Pairs]) -> Pairs:
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Pairs(*(torch.cat(values) for values in columns))
