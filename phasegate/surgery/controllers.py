"""Decide which expert to grow or to prune: a controller turns what it sees of a layer into a proposal.

A policy describes controllers by plain values, and builds one for each layer. `surgeon.py` says which proposals are
allowed, and `operations.py` how they are carried out.

Shapes: E experts, D model width.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from phasegate.model.classifier import Model
from phasegate.model.dense import Linear
from phasegate.model.routing_statistics import N_SCALARS, ExpertSignals, features
from phasegate.params.phases import EntropyLabels, RandomLabels, UsageLabels
from phasegate.records.tables import read_table
from phasegate.records.trial_folder import SURGERIES, SURGERY_COLUMNS
from phasegate.surgery.operations import ExpertManager, Surgery
from phasegate.surgery.probe import Probe
from phasegate.training.course import Course
from phasegate.training.predictions import example_losses
from phasegate.training.randomness import generator


class Action(IntEnum):
    """Name what to do with an expert; the values number the logits of a control head."""

    GROW = 0
    PRUNE = 1
    KEEP = 2


class Proposal(NamedTuple):
    """Propose one operation on one expert, by its index."""

    action: Action  # GROW or PRUNE
    expert: int


def in_order(plan: Iterable[Proposal]) -> list[Proposal]:
    """Sort the operations of a plan so that indices stay true: an expert that goes moves those behind it."""
    return sorted(plan, key=lambda proposal: -proposal.expert)


class Allowed(NamedTuple):
    """Mask the experts that may grow and the experts that may be pruned, (E,) each; and limit how many go at once."""

    grow: Tensor
    prune: Tensor
    at_once: int = 1

    def proposals(self, action: Action) -> list[Proposal]:
        """List the allowed operations of one kind, by index of the expert."""
        mask = self.grow if action == Action.GROW else self.prune
        return [Proposal(action, int(expert)) for expert in mask.nonzero().flatten()]


class Situation(NamedTuple):
    """Hold what a controller may look at when it decides."""

    probe: Probe  # the layer on the signal split
    allowed: Allowed
    draws: torch.Generator
    step: int  # of the phase
    ages: Tensor  # (E,) steps of training since each expert was made
    operate: Callable[[ExpertManager, Proposal, torch.Generator], Surgery]  # does an operation on a copy, the arm's way
    more: int = 1  # experts that growing adds
    expert_rate: float | None = None  # of expert matrices once an operation is done; None: as it is


class Controller(nn.Module):
    """Control one layer, with all state in parameters and buffers. This base class leaves the layer as it is."""

    def __init__(self, policy: Any, model: Model, optimizer: Optimizer, course: Course) -> None:
        super().__init__()
        self.policy, self.optimizer, self.course = policy, optimizer, course

    def loss(self, signals: ExpertSignals, draws: torch.Generator) -> Tensor | float:
        """Return a term for the training loss, from the batch's signals; only asked of controllers with parameters."""
        return 0.0

    def propose(self, situation: Situation) -> Proposal | None:
        """Propose one operation, or none."""
        return None

    def plan(self, situation: Situation) -> Sequence[Proposal]:
        """Return the operations to do now, on different experts: the one proposed, if any."""
        proposal = self.propose(situation)
        return () if proposal is None else (proposal,)


class Policy:
    """Describe the controllers of an arm, as plain values."""

    controller: ClassVar[type[Controller]] = Controller

    def build(self, model: Model, optimizer: Optimizer, course: Course) -> Controller:
        """Build the controller of one layer for a trial; its parameters join the optimizer."""
        return self.controller(self, model, optimizer, course)

    def files(self, seed: int) -> tuple[Path, ...]:
        """List the files that the controllers read in the trial of a seed."""
        return ()


Labels = RandomLabels | EntropyLabels | UsageLabels


def label(labels: Labels, signals: ExpertSignals, draws: torch.Generator) -> Tensor:
    """Label each expert with an `Action`, (E,).

    Random labels are drawn anew for every batch, so they carry no information. Usage compares an expert's load with
    an even share. Entropy says how replaceable an expert is: where the router hesitates, another expert would do, so
    the expert is pruned. Where the router does not, no other expert shares the work, so the expert grows. An expert
    without tokens is pruned.
    """
    match labels:
        case RandomLabels():
            chances = torch.tensor([labels.grow, labels.prune, 1 - labels.grow - labels.prune]).clamp(min=0)
            return torch.multinomial(chances, len(signals.load), True, generator=draws)
        case UsageLabels():
            share = signals.load * len(signals.load)
            grow, prune = share > labels.grow_above, share < labels.prune_below
        case EntropyLabels():
            ratio = signals.entropy.detach() / signals.batch_entropy.detach().clamp(min=1e-12)
            grow, prune = ratio < labels.grow_below, (ratio > labels.prune_above) | (signals.load == 0)
    return torch.where(prune, Action.PRUNE, torch.where(grow, Action.GROW, Action.KEEP))


def choose(weights: Tensor, allowed: Allowed, draws: torch.Generator | None = None) -> Proposal | None:
    """Choose an allowed operation by the weight (E, 3) of each `Action`: the greatest, or drawn in proportion to it."""
    possible = (weights[:, : Action.KEEP].double() * torch.stack([allowed.grow, allowed.prune], dim=1)).flatten()
    if not possible.any():
        return None
    chosen = possible.argmax() if draws is None else torch.multinomial(possible, 1, generator=draws)
    expert, action = divmod(int(chosen), int(Action.KEEP))
    return Proposal(Action(action), expert)


class LabelController(Controller):
    """Label each expert, and propose one of the labelled experts, drawn with equal chances."""

    policy: "LabelPolicy"

    def propose(self, situation: Situation) -> Proposal | None:
        labels = label(self.policy.labels, situation.probe.signals, situation.draws)
        return choose(F.one_hot(labels.cpu(), 3), situation.allowed, situation.draws)


@dataclass(frozen=True)
class LabelPolicy(Policy):
    """Let labels decide."""

    labels: Labels
    controller = LabelController


class HeadController(Controller):
    """Let a control head learn labels from expert features (E, D + 3), and decide."""

    policy: "HeadPolicy"

    def __init__(self, policy: "HeadPolicy", model: Model, optimizer: Optimizer, course: Course) -> None:
        super().__init__(policy, model, optimizer, course)
        inputs = model.spec.architecture.width + N_SCALARS
        self.head = nn.Sequential(Linear(inputs, 32), nn.ReLU(), Linear(32, 3)).to(course.gate.x.device)
        factor = policy.labels.head_lr / (course.schedule.lr_scale * course.training.lr)
        optimizer.add_param_group({"params": self.head.parameters(), "lr_factor": factor, "weight_decay": 0.0})

    def loss(self, signals: ExpertSignals, draws: torch.Generator) -> Tensor:
        """Return the weighted cross-entropy of the head on this batch's labels, nats."""
        x, labels = features(signals), self.policy.labels
        wanted = label(labels, signals, draws).to(x.device)
        weight = labels.loss_weight if isinstance(labels, RandomLabels) else 1.0
        return weight * F.cross_entropy(self.head(x.detach() if self.policy.detach else x), wanted)

    def propose(self, situation: Situation) -> Proposal | None:
        probs = self.head(features(situation.probe.signals)).softmax(-1).cpu()
        if self.policy.acts == "argmax":
            return choose(F.one_hot(probs.argmax(-1), 3) * probs, situation.allowed)
        decisions = torch.multinomial(probs, 1, generator=situation.draws).squeeze(1)
        return choose(F.one_hot(decisions, 3), situation.allowed, situation.draws)


@dataclass(frozen=True)
class HeadPolicy(Policy):
    """Let a head learn labels and decide; "sample" draws decisions, since the argmax of noise labels is always keep."""

    labels: RandomLabels | EntropyLabels
    acts: Literal["sample", "argmax"]
    detach: bool = True  # keep the gradient of the head's loss out of the trunk
    controller = HeadController


class YokedController(Controller):
    """Repeat what another arm did with the same seed, at the same steps, on experts that are drawn at random."""

    policy: "YokedPolicy"

    def __init__(self, policy: "YokedPolicy", model: Model, optimizer: Optimizer, course: Course) -> None:
        super().__init__(policy, model, optimizer, course)
        log = read_table(policy.files(course.seed)[0], SURGERY_COLUMNS)
        grown = log["n_routed_after"] > log["n_routed_before"]
        actions = [Action.GROW if grew else Action.PRUNE for grew in grown]
        self.actions: dict[tuple[int, int], list[Action]] = {}
        for step, block, action in zip(log["step"], log["block"], actions, strict=True):
            self.actions.setdefault((step, block), []).append(action)

    def plan(self, situation: Situation) -> Sequence[Proposal]:
        """Return the operations of this step, each on an expert that may have it; where none may, it is left out."""
        at, allowed, plan = (situation.step, situation.probe.block), situation.allowed, dict[int, Proposal]()
        draws = generator(self.course.seed, "yoked", *at)  # the other arm may have chosen by `situation.draws`
        for action in self.actions.get(at, [])[: allowed.at_once]:
            if proposals := [proposal for proposal in allowed.proposals(action) if proposal.expert not in plan]:
                drawn = proposals[int(torch.randint(len(proposals), (), generator=draws))]
                plan[drawn.expert] = drawn
        return tuple(plan.values())


@dataclass(frozen=True)
class YokedPolicy(Policy):
    """Repeat the operations of another arm, which tells what its choice of experts is worth."""

    arm: Path  # holds the folders of its trials: seed-0, seed-1, ...
    controller = YokedController

    def files(self, seed: int) -> tuple[Path, ...]:
        return (self.arm / f"seed-{seed}" / SURGERIES,)


class TimedController(Controller):
    """Grow the busiest expert at one step, as often as the surgeon asks."""

    policy: "TimedPolicy"

    def propose(self, situation: Situation) -> Proposal | None:
        proposals, load = situation.allowed.proposals(Action.GROW), situation.probe.signals.load
        steps, draws = self.policy.steps, generator(self.course.seed, "time of growth")
        if situation.step != steps[int(torch.randint(len(steps), (), generator=draws))]:
            return None
        return max(proposals, key=lambda proposal: float(load[proposal.expert]), default=None)


@dataclass(frozen=True)
class TimedPolicy(Policy):
    """Grow when told: at a step, or at one that is drawn from several."""

    steps: tuple[int, ...]
    controller = TimedController


class InformedController(Controller):
    """Prune experts that are known to be dead: all their weights are zero."""

    def propose(self, situation: Situation) -> Proposal | None:
        weights = situation.probe.layer.weights
        prunable = situation.allowed.proposals(Action.PRUNE)
        return next((proposal for proposal in prunable if not weights(proposal.expert).count_nonzero()), None)


class InformedPolicy(Policy):
    """Prune what is known to be dead."""

    controller = InformedController


class PlannedController(Controller):
    """Carry out a plan: grow the busiest expert a number of times, then prune by usage or by the loss right after."""

    policy: "PlannedPolicy"
    done: Tensor  # () operations so far

    def __init__(self, policy: "PlannedPolicy", model: Model, optimizer: Optimizer, course: Course) -> None:
        super().__init__(policy, model, optimizer, course)
        self.register_buffer("done", torch.tensor(0))

    def propose(self, situation: Situation) -> Proposal | None:
        """Propose the next operation of the plan; where none is allowed, the plan waits."""
        if self.done == self.policy.grow + self.policy.prune:
            return None
        action = Action.GROW if self.done < self.policy.grow else Action.PRUNE
        proposals, load = situation.allowed.proposals(action), situation.probe.signals.load
        if not proposals:
            return None
        self.done += 1
        if action == Action.PRUNE and self.policy.prune_by == "loss":
            return min(proposals, key=lambda proposal: self.loss_after(situation, proposal))
        extreme = max if action == Action.GROW else min
        return extreme(proposals, key=lambda proposal: float(load[proposal.expert]))

    def loss_after(self, situation: Situation, proposal: Proposal) -> float:
        """Measure the mean signal loss (nats) right after an operation, which is done on a copy of the layer."""
        probe = situation.probe
        with probe.model.spare_layer(probe.block) as spare:
            situation.operate(ExpertManager(spare), proposal, generator(self.course.seed, "tried", probe.block))
            return float(example_losses(probe.model, probe.examples).mean())


@dataclass(frozen=True)
class PlannedPolicy(Policy):
    """Plan the operations beforehand: so surgery is measured apart from the signal that calls for it."""

    grow: int
    prune: int = 0
    prune_by: Literal["usage", "loss"] = "usage"
    controller = PlannedController
