"""Keeps the state after each finished step in `<output>.partial`, from which a killed run is resumed."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cor_vllm.calibrate.config import CalibrationError

FORMAT = "cor-partial/1"
SAVE_FREELY = 1.0  # seconds: a state that is written faster than this is written after every step
SAVE_RATIO = 10  # a slower one is written once the work since has taken this many times as long
BASELINE_TOLERANCE = 1e-3  # nats; other weights under the same routers differ by more


class PartialState:
    """The partial state of the calibration into one output file.

    Args:
        output: the final scores file.
        key: a hash of everything that determines the measurements; state of another key is never used.
        baseline: [P] float32 unperturbed losses, nats; they tell changed weights, which the key cannot see.
    """

    def __init__(self, output: Path, key: str, baseline: torch.Tensor) -> None:
        self.path = partial_path(output)
        self._key = key
        self._baseline = baseline

    def load(self) -> tuple[dict[str, torch.Tensor], str]:
        """An algorithm's state, and one line to tell the user ("" if there was no file)."""
        if not self.path.exists():
            return {}, ""
        try:
            tensors = load_file(self.path)
        except SafetensorError:
            return {}, f"{self.path} is damaged: starting from the first layer"
        baseline = tensors.pop(f"{self._key}/baseline", None)
        if baseline is None:
            return {}, f"{self.path} is of another calibration: starting from the first layer"
        same = baseline.shape == self._baseline.shape
        if not same or not torch.allclose(baseline, self._baseline, rtol=0, atol=BASELINE_TOLERANCE):
            return {}, f"{self.path} is of other model weights: starting from the first layer"
        return tensors, f"resuming from {self.path}"

    def save(self, state: Mapping[str, torch.Tensor]) -> None:
        """Keep an algorithm's state; the file is replaced in one step, never half written.

        Raises:
            CalibrationError: there is no room, or writing is not allowed.
        """
        tensors = {name: values.contiguous() for name, values in state.items()}
        tensors[f"{self._key}/baseline"] = self._baseline
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            save_file(tensors, temporary, {"format": FORMAT})  # without a second copy in memory
            os.replace(temporary, self.path)
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            raise CalibrationError(
                f"{self.path}: the state to resume from cannot be written ({error}); make room there, or "
                "choose another --output"
            ) from None
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Delete the state; the result is complete."""
        self.path.unlink(missing_ok=True)


def partial_path(output: Path) -> Path:
    """Where the state of a calibration into `output` lies."""
    return output.with_name(f"{output.name}.partial")


class Steps(Protocol):
    """A measurement that is made step by step."""

    def work(self) -> Sequence[int]:
        """How much each step has to do, in units of progress."""

    def step(self, index: int) -> None:
        """Do one step."""

    def state(self, steps: int) -> Mapping[str, torch.Tensor]:
        """What `restore` needs to go on after so many steps."""

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Take up a saved state and return the number of finished steps."""


def run_steps(
    steps: Steps,
    state: PartialState,
    resume: bool,
    update: Callable[..., None],
    say: Callable[[str], None],
) -> None:
    """Do all steps that are not done yet, and keep the state on the way.

    Args:
        steps: the measurement.
        state: where its state is kept.
        resume: go on from the state that is there.
        update: is called with `total` and `completed` units of work, and with `step` in words.
        say: is given one line about the state if there was any.
    """
    work, finished = steps.work(), 0
    if resume:
        tensors, note = state.load()
        finished = steps.restore(tensors)
        if note:
            say(note)
    update(total=sum(work), completed=sum(work[:finished]))
    saved, duration = time.monotonic(), 0.0
    for index in range(finished, len(work)):
        update(step=f"step {index + 1} of {len(work)}")
        steps.step(index)
        if time.monotonic() - saved >= duration * SAVE_RATIO:
            started = time.monotonic()
            state.save(steps.state(index + 1))
            saved = time.monotonic()
            duration = saved - started if saved - started > SAVE_FREELY else 0.0
