"""Measure how operations change the loss: fork a model in training in pairs, and compare.

A fork is a copy of model and optimizer that is trained for some more steps, while its learning rate falls to zero: that
takes out most of the noise of single batches. Two forks that see the same batches differ by what was done to one of
them at the start. An exact split has no immediate effect, so its value shows only after training. Pruning hurts
immediately and may recover.

Losses are taken at each fork's best temperature. An overconfident model loses less after almost any disturbance, which
a temperature would do for nothing, and its few confident mistakes make most of the noise.

Shapes: P plans, R repeats, N examples.
"""

import copy
from collections.abc import Sequence
from functools import partial
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from phasegate.base.errors import Diverged
from phasegate.model.classifier import Model
from phasegate.signals.oracle import losses_without_each
from phasegate.signals.roots import root
from phasegate.surgery.controllers import Proposal, Situation, in_order
from phasegate.surgery.moments import set_expert_rate
from phasegate.surgery.operations import ExpertManager, grow_older
from phasegate.surgery.probe import Probe
from phasegate.training import batches, loop, losses, predictions, randomness
from phasegate.training.course import Course


class Estimate(NamedTuple):
    """Hold a change of the mean loss (nats; below zero is a gain) and its standard error, of equal shapes."""

    change: Tensor
    error: Tensor

    def gain(self, price: Tensor | float, certainty: float = 0.5) -> Tensor:
        """Return by how much (nats) the loss falls more than a price, at least, with a probability of `certainty`."""
        return -self.change - price - NormalDist().inv_cdf(certainty) * self.error


def estimate(changes: Tensor) -> Estimate:
    """Average changes (P, R, N) over repeats and examples, with standard errors, (P,) each.

    Examples and batches are both samples. What examples add is the variance of their means. What batches add, beyond
    their interaction with examples, which those means hold, is known badly from R repeats, so it is pooled over the
    operations; a single repeat does not tell it.
    """
    repeats, examples = changes.shape[-2:]
    variance = changes.mean(-2).var(-1) / examples
    if repeats > 1:
        batches = (examples * changes.mean(-1).var(-1) - changes.var(-2).mean(-1)) / (examples - 1)
        variance = variance + batches.mean().clamp(min=0) / repeats
    return Estimate(changes.mean((-2, -1)), root(variance))


def _age(model: Model, optimizer: Optimizer, step: int, loss: Tensor) -> None:
    for moe in model.layers:
        grow_older(moe, optimizer)


def removals(probe: Probe) -> Estimate:
    """Measure the immediate change of the probed loss by the removal of each expert (E,); inf where it is refused."""
    change, error = estimate((losses_without_each(probe) - probe.losses).unsqueeze(-2))
    return Estimate(change, error.nan_to_num(0.0))


def fork_proposals(
    plans: Sequence[Sequence[Proposal]],
    situation: Situation,
    optimizer: Optimizer,
    course: Course,
    steps: int,
    repeats: int,
) -> tuple[Tensor, Tensor]:
    """Measure plans, each of operations done in the arm's way: (operations + training) - (nothing + the same training).

    Each repeat has batches of its own, and draws anew what is random about an operation. Returns the changes of every
    example's loss on the signal and the gate split, (P, R, N) each.
    """
    probe, step, found = situation.probe, situation.step, []
    rates = loop.cosine(course.rates[step], steps)
    for repeat in range(repeats):
        seed = randomness.derived_seed(course.seed, "fork", step, repeat)
        drawn = batches.Batches(course.train, course.training.batch, seed, course.training)
        ends: list[list[Tensor]] = []
        for plan in ((), *plans):
            model, trained_by = copy.deepcopy((probe.model, optimizer))
            draws = randomness.generator(course.seed, "fork", step, probe.block, repeat)
            for proposal in in_order(plan):
                situation.operate(ExpertManager(model.layers[probe.block], trained_by), proposal, draws)
            if plan and situation.expert_rate is not None:
                set_expert_rate(model, trained_by, situation.expert_rate)
            objective = losses.plain_objective(model, course.training.label_smoothing)
            try:
                with torch.enable_grad():
                    loop.fit(model, trained_by, drawn, objective, rates, partial(_age, model, trained_by))
            except Diverged as error:
                raise Diverged(f"{error.what} in a fork", step) from None
            ends.append([predictions.calibrated_losses(model, split) for split in (course.signal, course.gate)])
        signal, gate = (torch.stack(split) for split in zip(*ends, strict=True))  # (1 + P, N)
        found.append((signal[1:] - signal[0], gate[1:] - gate[0]))
    signal, gate = (torch.stack(split, dim=1) for split in zip(*found, strict=True))
    return signal, gate
