"""What would happen: paired forks of a model in training, and the measured changes of loss with standard errors.

A fork is a copy of model and optimizer that goes on for some steps of ordinary training. Two forks that see the same
batches differ by what was done to one of them at the start. An exact split changes nothing at once, so growth can be
measured in no other way; pruning costs at once, and training may make it good.

Shapes: P operations, R repeats, N examples.
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from phasegate.errors import Diverged
from phasegate.expert_manager import ExpertManager
from phasegate.model import Model
from phasegate.oracle import example_losses, losses_without_each
from phasegate.probe import Probe
from phasegate.randomness import derived_seed
from phasegate.training import Batches, Course, fit, plain_objective

Operation = Callable[[ExpertManager, int], object]
"""Operates on a layer through its manager; the number of the repeat may seed what is random about it."""


class Estimate(NamedTuple):
    """A change of the mean loss (nats; below zero is a gain) and its standard error, of equal shapes."""

    change: Tensor
    error: Tensor

    def gain(self, price: Tensor | float) -> Tensor:
        """What is gained for certain: the fall of the loss, less a price (nats) and two standard errors."""
        return -self.change - price - 2 * self.error


class Forked(NamedTuple):
    """Changes of the loss of every example, against the fork to which nothing was done."""

    signal: Tensor  # (P, R, N)
    gate: Tensor  # (P, R, N)


def estimate(changes: Tensor) -> Estimate:
    """Changes (..., R, N) -> their mean over repeats and examples, with its standard error, (...).

    Examples and batches are both samples: var(example means) / N + var(repeat means) / R, which counts their
    interaction twice and so is not too small in expectation. A lone repeat has the first term alone.
    """
    repeats, examples = changes.shape[-2:]
    variance = changes.mean(-2).var(-1) / examples
    if repeats > 1:
        variance = variance + changes.mean(-1).var(-1) / repeats
    return Estimate(changes.mean((-2, -1)), variance.sqrt())


def removals(probe: Probe) -> Estimate:
    """The change of the probed loss as each expert goes (E,), at once; inf where it can't be removed."""
    change, error = estimate((losses_without_each(probe) - probe.losses).unsqueeze(-2))
    return Estimate(change, error.nan_to_num(0.0))


class Forks:
    """Measures operations on a model's layers: (operation + training) - (nothing + the same training).

    Args:
        steps: of training in each fork.
        repeats: R, each with batches of its own.
    """

    def __init__(self, model: Model, optimizer: Optimizer, course: Course, steps: int, repeats: int) -> None:
        self.model, self.optimizer, self.course = model, optimizer, course
        self.steps, self.repeats = steps, repeats

    def measure(self, block: int, step: int, operations: Sequence[Operation]) -> Forked:
        """Changes by each operation on a block's layer, done at a step of the trial, from which the rates follow."""
        repeats = [self._repeat(block, step, operations, repeat) for repeat in range(self.repeats)]
        return Forked(*(torch.stack(split, dim=1) for split in zip(*repeats, strict=True)))

    def _repeat(self, block: int, step: int, operations: Sequence[Operation], repeat: int) -> tuple[Tensor, Tensor]:
        """The changes of one repeat on the signal and the gate split, (P, N) each."""
        course = self.course
        seed = derived_seed(course.seed, "fork", step, repeat)
        batches = Batches(course.train, course.training.batch, seed, course.training)
        rates = course.rates[step : step + self.steps]
        ends: list[list[Tensor]] = []
        for operate in (None, *operations):
            model, optimizer = copy.deepcopy((self.model, self.optimizer))
            if operate:
                operate(ExpertManager(model.layers[block], optimizer), repeat)
            with torch.enable_grad():
                objective = plain_objective(model, course.training.label_smoothing)
                try:
                    fit(model, optimizer, batches, objective, rates, lambda step, loss: None)
                except Diverged as error:
                    raise Diverged(f"{error.what} in a fork", step) from None
            ends.append([example_losses(model, split) for split in (course.signal, course.gate)])
        signal, gate = (torch.stack(losses) for losses in zip(*ends, strict=True))  # (1 + P, N)
        return signal[1:] - signal[0], gate[1:] - gate[0]
