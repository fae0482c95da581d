"""Four experts of trained models are killed: measuring finds most of them, and takes no living one for dead.

This guards the code and is no evidence for the rule: the models were chosen, among some ten kinds, by this very outcome
in seeds 0 to 4. In seeds 5 to 9, not looked at before, the new and the old rule find the same 13 of 20 dead, and no
living: once some of the dead are gone, the others do no harm that removing them would undo.
"""

from copy import deepcopy
from statistics import mean
from typing import NamedTuple
from unittest import mock

import torch
from torch.optim import Optimizer

from phasegate.model.classifier import Model, ModelSpec
from phasegate.params.fields import override
from phasegate.params.phases import Schedule
from phasegate.params.pretraining import Training
from phasegate.signals import forks, ground_truth
from phasegate.signals.ground_truth import MeasuredPolicy, MeasuringController
from phasegate.surgery.controllers import Action, Proposal, Situation
from phasegate.surgery.surgeon import Surgeon, Treatment
from phasegate.training import loop, losses
from phasegate.training.batches import Batches, Examples
from phasegate.training.course import Course
from tests.models import ARCHITECTURE, draws

SEEDS, EXPERTS, DEAD, WIDTH = range(5), 12, 4, 16


class OldController(MeasuringController):
    """The rule of the first study: one candidate of a kind, both splits twice their errors from zero."""

    def propose(self, situation: Situation) -> Proposal | None:
        price, course = ground_truth._price(self.policy.price, situation), self.course
        cost = forks.removals(situation.probe)
        proposals = self._candidates(situation)[:1]
        cheapest = [p for p in self._candidates(situation) if p.action == Action.PRUNE][:1]
        proposals += [p for p in cheapest if (cost.change - 2 * cost.error)[p.expert] <= price[Action.GROW]]
        rates = course.rates[situation.step : situation.step + self.policy.steps]
        with mock.patch.object(loop, "cosine", lambda peak, steps: rates):
            found = forks.fork_proposals(
                proposals, situation, self.optimizer, course, self.policy.steps, self.policy.repeats
            )
        gains = []
        for changes in found:  # (P, R, N)
            repeats, examples = changes.shape[1:]
            variance = changes.mean(1).var(-1) / examples + changes.mean(2).var(-1) / repeats
            prices = torch.tensor([price[proposal.action] for proposal in proposals])
            gains.append(-changes.mean((1, 2)) - prices - 2 * variance.sqrt())
        best = int(gains[0].argmax())
        return proposals[best] if gains[0][best] > 0 and gains[1][best] > 0 else None


class Damaged(NamedTuple):
    """A trained model of which some experts are dead, and the phase that follows."""

    model: Model
    optimizer: Optimizer
    course: Course
    dead: list[int]


def examples(n: int, seed: int) -> Examples:
    """Points around four centres of each of six classes."""
    random, centres = draws(seed), torch.randn(24, 1, WIDTH, generator=draws(0))
    cluster = torch.randint(24, (n,), generator=random)
    return Examples(centres[cluster] + 0.8 * torch.randn(n, 1, WIDTH, generator=random), cluster % 6)


def damaged(seed: int, schedule: Schedule, training: Training) -> Damaged:
    torch.manual_seed(seed)
    changes = {"blocks": 1, "n_routed": EXPERTS, "width": WIDTH, "dropout": 0.0, "balance_bias": 0.0, "z_loss": 0.0}
    model = Model(ModelSpec(override(ARCHITECTURE, changes, ""), (1, WIDTH), (6,)))
    with torch.no_grad():
        for weights in (model.layers[0].w_in, model.layers[0].w_out):
            weights.copy_(weights[:1].expand_as(weights))  # experts that begin as copies can stand in for each other
    train, signal, gate = (examples(n, n) for n in (4000, 4001, 4002))
    course = Course(train, signal, gate, training, schedule, seed)
    optimizer = loop.make_optimizer(model.parameters(), training)
    objective, rates = losses.plain_objective(model, 0), loop.cosine(training.lr, training.steps)
    loop.fit(model, optimizer, Batches(course.train, training.batch, seed, training), objective, rates, lambda *_: None)
    dead = torch.randperm(EXPERTS, generator=draws(seed))[:DEAD].tolist()
    with torch.no_grad():
        for weights in (model.layers[0].w_in, model.layers[0].w_out):
            weights[dead] = 0
    return Damaged(model, optimizer, course, dead)


def found(start: Damaged, policy: MeasuredPolicy) -> tuple[int, int]:
    """Return how many of the dead, and how many living experts, the phase removes."""
    model, optimizer = deepcopy((start.model, start.optimizer))
    surgeon = Surgeon(model, optimizer, Treatment(policy), start.course)

    def after_step(step: int, loss: object) -> None:
        if start.course.acts_at(step):
            surgeon.act(step)

    objective = losses.plain_objective(model, 0)
    loop.fit(model, optimizer, start.course.batches, objective, start.course.rates, after_step)
    gone = [row["expert"] in start.dead for row in surgeon.log if row["operation"] == "remove"]
    return sum(gone), len(gone) - sum(gone)


def test_measuring_finds_the_dead_and_spares_the_living(schedule: Schedule, training: Training) -> None:
    changes = {"steps": 60, "lr_scale": 0.1, "act_every": 10, "settle": 20, "max_experts": 14}
    schedule = override(schedule, changes, "")
    training = override(training, {"steps": 150, "noise": 0.0, "shift": 0, "batch": 64}, "")
    policy = MeasuredPolicy(price=1e-8, certainty=0.9, candidates=2, steps=20, repeats=2, every=1)
    starts = [damaged(seed, schedule, training) for seed in SEEDS]
    new = [found(start, policy) for start in starts]
    with mock.patch.object(MeasuredPolicy, "controller", OldController):
        old = [found(start, policy) for start in starts]
    assert mean(dead for dead, _ in new) >= 3 > mean(dead for dead, _ in old), (new, old)
    assert not any(living for _, living in new + old), (new, old)
