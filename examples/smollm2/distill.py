"""The second, end-to-end part of the conversion: the dense model teaches the split one.

The loss is KL(dense || split), plus small terms that keep the experts' load even and
probability inside the top k. The recipe's parts learn; the dense weights stay as they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from student import Student, selected
from torch.nn import functional

WARMUP = 20
FLOOR = 0.02  # of the peak learning rates, at the end
CHUNK = 128  # positions at a time where [P, vocabulary] is needed
EVEN, INSIDE = 0.02, 0.02


@dataclass(frozen=True)
class Settings:
    """Peak learning rates by kind of parameter, and the size of a step."""

    router: float = 4e-4  # the fitted logits differ little, so that weights are near one
    gain: float = 2e-3  # relative, as for the norms
    norm: float = 2e-3
    update: float = 1e-3
    rows: int = 4
    positions: float = 1.0  # share of the positions that the loss looks at
    clip: float = 1.0


def rate_factor(step: int, progress: float) -> float:
    """Warm-up by steps, then a half cosine by progress in [0, 1]."""
    decay = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return min(1.0, (step + 1) / WARMUP) * decay


def kl_and_gradient(
    student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Mean KL(teacher || student) in nats and its gradient in the student's states.

    By hand, chunk by chunk: autograd would keep several [P, V] tensors.

    Args:
        student: [P, D] last hidden states.
        teacher: [P, D].
        head: [V, D] output embedding.
    """
    total, gradients = 0.0, []
    for ours, theirs in zip(student.split(CHUNK), teacher.split(CHUNK), strict=True):
        log_p = functional.linear(theirs, head).float().log_softmax(-1)
        log_q = functional.linear(ours, head).float().log_softmax(-1)
        p = log_p.exp()
        total += float((p * (log_p - log_q)).sum())
        gradients.append((log_q.exp_().sub_(p) / len(student)).to(head.dtype) @ head)
    return total / len(student), torch.cat(gradients).to(student.dtype)


def routing_penalty(student: Student) -> torch.Tensor:
    """Mean over layers of the uneven load (1 if even) and of the probability outside the top k, weighted."""
    total = torch.zeros(())
    splits = student.splits()
    for split in splits:
        probabilities = split.probabilities
        if probabilities is None:
            raise RuntimeError("the penalty needs a forward before it")
        mask = selected(probabilities.detach(), split.layout.top_k)
        load = mask.mean(0) / split.layout.top_k
        uneven = split.layout.experts * (load * probabilities.mean(0)).sum()
        outside = (probabilities * (1 - mask)).sum(-1).mean()
        total = total + EVEN * uneven + INSIDE * outside
    return total / max(1, len(splits))


class Distillation:
    """Teacher, student and optimiser, with their checkpoint.

    Args:
        teacher: the dense model; frozen weights in the student's type.
        student: what learns.
        settings: rates and sizes.
        path: the checkpoint; gone on from if it exists.
        seed: of the positions that the loss looks at.
    """

    def __init__(self, teacher: Any, student: Student, settings: Settings, path: Path, seed: int) -> None:
        self.teacher, self.student, self.settings, self.path = teacher, student, settings, path
        self.rates = {kind: getattr(settings, kind) for kind in student.groups()}
        groups = [{"params": found, "lr": self.rates[kind]} for kind, found in student.groups().items()]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.seconds, self.curve = 0, 0.0, list[list[float]]()
        if path.exists():
            self.load()

    def load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        own = dict(self.student.named_parameters())
        for name, tensor in state["parameters"].items():
            own[name].data.copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]

    def save(self) -> None:
        trained = {n: p.data for n, p in self.student.named_parameters() if p.requires_grad}
        state = {
            "parameters": trained,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def learn(self, ids: torch.Tensor, progress: float) -> tuple[float, float]:
        """One step on token ids [B, S]; returns KL in nats and the routing penalty."""
        for group, rate in zip(self.optimizer.param_groups, self.rates.values(), strict=True):
            group["lr"] = rate * rate_factor(self.step, progress)
        count = round(ids.numel() * self.settings.positions)
        pick = torch.randperm(ids.numel(), generator=self.generator)[:count].to(ids.device)
        with torch.no_grad():
            theirs = self.teacher.model(input_ids=ids, use_cache=False).last_hidden_state
        ours = self.student(ids)
        chosen = ours.flatten(0, 1)[pick]
        with torch.no_grad():
            head = self.teacher.lm_head.weight
            kl, gradient = kl_and_gradient(chosen.detach(), theirs.flatten(0, 1)[pick], head)
        penalty = routing_penalty(self.student)
        torch.autograd.backward([chosen, penalty], [gradient, torch.ones_like(penalty)])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return kl, float(penalty.detach())

    def run(self, rows: torch.Tensor, seconds: float, save_every: float, saved: Callable[[], str]) -> None:
        """Go through rows [n, S] in order until ``seconds`` of training are spent, or the rows are.

        Args:
            rows: token ids in training order.
            seconds: budget; the learning rate falls to its floor by its end.
            save_every: seconds between checkpoints.
            saved: called after each; what it returns is printed.
        """
        recent: list[float] = []
        since = self.seconds
        while self.seconds < seconds and (self.step + 1) * self.settings.rows <= len(rows):
            began = time.monotonic()
            part = rows[self.step * self.settings.rows : (self.step + 1) * self.settings.rows]
            kl, penalty = self.learn(part, self.seconds / seconds)
            self.seconds += time.monotonic() - began
            recent.append(kl)
            if self.step % 10 == 0:
                mean = sum(recent) / len(recent)
                self.curve.append([self.step, self.seconds, mean])
                print(
                    f"step {self.step}  kl {mean:.4f}  penalty {penalty:.4f}  {self.seconds:.0f} s  "
                    f"{self.seconds / self.step:.2f} s a step",
                    flush=True,
                )
                recent = []
            if self.seconds - since > save_every:
                since = self.seconds
                self.save()
                print(saved(), flush=True)
        self.save()
        print(saved(), flush=True)
