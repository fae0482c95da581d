"""Control by ground truth (phase 7b.4): act on how an operation changes the loss, as predicted or as measured.

An operation is done if the loss is likely enough to fall by more than a price. The price is per parameter: growth pays
it, and pruning earns it. No controller trusts the examples by which it chose: labels come from the signal split, and
the gate split decides whether to act.

Shapes: E experts, C changes (`features.CHANGES`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import Optimizer

from phasegate.model.classifier import Model
from phasegate.signals.features import Change, situation_features
from phasegate.signals.forks import Estimate, estimate, fork_proposals
from phasegate.signals.predictor import HEAD, load_head
from phasegate.signals.published import taylor_saliency
from phasegate.surgery.controllers import Action, Controller, Policy, Proposal, Situation
from phasegate.training.course import Course


class PredictingController(Controller):
    """Do the allowed operation with the most certain gain, as a head predicts it, if it is certain enough."""

    policy: "PredictedPolicy"

    def __init__(self, policy: "PredictedPolicy", model: Model, optimizer: Optimizer, course: Course) -> None:
        super().__init__(policy, model, optimizer, course)
        self.head = load_head(policy.heads / f"seed-{course.seed}", course.gate.x.device)

    def propose(self, situation: Situation) -> Proposal | None:
        predicted = self.head.predict(situation_features(situation, self.course))
        price, gains = _price(self.policy.price, situation), dict[Proposal, float]()
        for action, change in ((Action.GROW, Change.GROW), (Action.PRUNE, Change.RECOVERED)):
            estimate = Estimate(predicted.change[:, change], predicted.error[:, change])
            gain = estimate.gain(price[action], self.policy.certainty).cpu()
            gains |= {proposal: float(gain[proposal.expert]) for proposal in situation.allowed.proposals(action)}
        best = max(gains, key=lambda proposal: gains[proposal], default=None)
        return best if best is not None and gains[best] > 0 else None


@dataclass(frozen=True)
class PredictedPolicy(Policy):
    """Let the head of a trial's seed decide, which was trained on the surveys of all other seeds."""

    heads: Path  # holds seed-0, seed-1, ...
    price: float  # nats per parameter
    certainty: float  # probability of a gain above the price at which it acts
    controller = PredictingController

    def files(self, seed: int) -> tuple[Path, ...]:
        return (self.heads / f"seed-{seed}" / HEAD,)


class MeasuringController(Controller):
    """Measure the most promising operations by forks: choose on the signal split, decide on the gate split.

    Candidates to grow are the busiest experts, one by one. Candidates to go are the expert with the least Taylor
    saliency, the two with the least, and so on: a part of what dead experts cost is felt only once all are gone.
    """

    policy: "MeasuredPolicy"

    def plan(self, situation: Situation) -> Sequence[Proposal]:
        """Return the operations that gain most on the signal split, if their gain on the gate split is certain."""
        price, policy = _price(self.policy.price, situation), self.policy
        chance = situation.step // self.course.schedule.act_every - 1
        if chance % policy.every or not (plans := self._candidates(situation)):
            return ()
        prices = torch.tensor([sum(price[proposal.action] for proposal in plan) for plan in plans])
        forked = fork_proposals(plans, situation, self.optimizer, self.course, policy.steps, policy.repeats)
        signal, gate = (estimate(changes) for changes in forked)
        best = int(signal.gain(prices.to(signal.change)).argmax())
        return plans[best] if gate.gain(prices.to(gate.change), policy.certainty)[best] > 0 else ()

    def _candidates(self, situation: Situation) -> list[list[Proposal]]:
        probe, allowed, most = situation.probe, situation.allowed, self.policy.candidates
        needed = taylor_saliency(probe, situation.draws).prune
        assert needed is not None
        busiest = sorted(
            allowed.proposals(Action.GROW), key=lambda proposal: -float(probe.signals.load[proposal.expert])
        )
        idlest = sorted(allowed.proposals(Action.PRUNE), key=lambda proposal: float(needed[proposal.expert]))
        sets = [idlest[:count] for count in range(1, 1 + min(most, len(idlest), allowed.at_once))]
        return [[proposal] for proposal in busiest[:most]] + sets


@dataclass(frozen=True)
class MeasuredPolicy(Policy):
    """Let measurements decide."""

    price: float  # nats per parameter
    certainty: float  # probability of a gain above the price at which it acts
    candidates: int  # of each kind that are measured at most: experts to grow, sets of experts to remove
    steps: int  # of training in each fork
    repeats: int  # of each fork, with other batches
    every: int  # it decides at the first of so many chances
    controller = MeasuringController


def _price(per_parameter: float, situation: Situation) -> dict[Action, float]:
    """Return what each action has to gain (nats): growth pays for an expert's parameters, and pruning earns them."""
    price = per_parameter * situation.probe.layer.weights(0).numel()
    return {Action.GROW: price * situation.more, Action.PRUNE: -price}
