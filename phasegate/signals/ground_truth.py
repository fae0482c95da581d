"""Control by ground truth (phase 7b.4): act on how an operation changes the loss, as predicted or as measured.

An operation is done if the loss is likely enough to fall by more than a price. The price is per parameter: growth pays
it, and pruning earns it. No controller trusts the examples by which it chose: labels come from the signal split, and
the gate split decides whether to act.

Shapes: E experts, C changes (`features.CHANGES`).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import Optimizer

from phasegate.model.classifier import Model
from phasegate.signals.features import Change, situation_features
from phasegate.signals.forks import Estimate, estimate, fork_proposals, removals
from phasegate.signals.predictor import HEAD, load_head
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

    Candidates to grow are the busiest experts. Candidates to prune cost least right after the removal.
    """

    policy: "MeasuredPolicy"

    def propose(self, situation: Situation) -> Proposal | None:
        """Propose the operation that gains most on the signal split, if its gain on the gate split is certain."""
        price, policy = _price(self.policy.price, situation), self.policy
        chance = situation.step // self.course.schedule.act_every - 1
        if chance % policy.every or not (proposals := self._candidates(situation)):
            return None
        prices = torch.tensor([price[proposal.action] for proposal in proposals])
        forked = fork_proposals(proposals, situation, self.optimizer, self.course, policy.steps, policy.repeats)
        signal, gate = (estimate(changes) for changes in forked)
        best = int(signal.gain(prices.to(signal.change)).argmax())
        return proposals[best] if gate.gain(prices.to(gate.change), policy.certainty)[best] > 0 else None

    def _candidates(self, situation: Situation) -> list[Proposal]:
        load, cost, allowed = situation.probe.signals.load, removals(situation.probe).change, situation.allowed
        busiest = sorted(allowed.proposals(Action.GROW), key=lambda proposal: -float(load[proposal.expert]))
        cheapest = sorted(allowed.proposals(Action.PRUNE), key=lambda proposal: float(cost[proposal.expert]))
        return busiest[: self.policy.candidates] + cheapest[: self.policy.candidates]


@dataclass(frozen=True)
class MeasuredPolicy(Policy):
    """Let measurements decide."""

    price: float  # nats per parameter
    certainty: float  # probability of a gain above the price at which it acts
    candidates: int  # operations of each kind that are measured at most
    steps: int  # of training in each fork
    repeats: int  # of each fork, with other batches
    every: int  # it decides at the first of so many chances
    controller = MeasuringController


def _price(per_parameter: float, situation: Situation) -> dict[Action, float]:
    """Return what each action has to gain (nats): growth pays for an expert's parameters, and pruning earns them."""
    price = per_parameter * situation.probe.layer.weights(0).numel()
    return {Action.GROW: price * situation.more, Action.PRUNE: -price}
