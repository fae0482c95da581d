"""Control by ground truth (phase 7b.4): act on how an operation changes the loss, as predicted or as measured.

An operation is worth doing if the loss falls by more than a price and two standard errors of the change. The price is
per parameter: growth pays it, and pruning earns it. No controller trusts the examples by which it chose: labels come
from the signal split, and the gate split decides whether to act.

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
    """Do the allowed operation with the greatest gain, as a head predicts it, if that gain is certain."""

    policy: "PredictedPolicy"

    def __init__(self, policy: "PredictedPolicy", model: Model, optimizer: Optimizer, course: Course) -> None:
        super().__init__(policy, model, optimizer, course)
        self.head = load_head(policy.heads / f"seed-{course.seed}", course.gate.x.device)

    def propose(self, situation: Situation) -> Proposal | None:
        predicted = self.head.predict(situation_features(situation, self.course))
        price, gains = _price(self.policy.price, situation), dict[Proposal, float]()
        for action, change in ((Action.GROW, Change.GROW), (Action.PRUNE, Change.RECOVERED)):
            gain = Estimate(predicted.change[:, change], predicted.error[:, change]).gain(price[action]).cpu()
            gains |= {proposal: float(gain[proposal.expert]) for proposal in situation.allowed.proposals(action)}
        best = max(gains, key=lambda proposal: gains[proposal], default=None)
        return best if best is not None and gains[best] > 0 else None


@dataclass(frozen=True)
class PredictedPolicy(Policy):
    """Let the head of a trial's seed decide, which was trained on the surveys of all other seeds."""

    heads: Path  # holds seed-0, seed-1, ...
    price: float  # nats per parameter
    controller = PredictingController

    def files(self, seed: int) -> tuple[Path, ...]:
        return (self.heads / f"seed-{seed}" / HEAD,)


class MeasuringController(Controller):
    """Measure the most promising operations by forks, and do the best if its gain is certain on both splits.

    Candidates to grow are the busiest experts. Candidates to prune cost least right after the removal, and not
    certainly more than they earn: training has never been seen to recover that.
    """

    policy: "MeasuredPolicy"

    def propose(self, situation: Situation) -> Proposal | None:
        """Propose the operation with the most certain gain on the signal split, if the gate split confirms it."""
        price, policy = _price(self.policy.price, situation), self.policy
        if not (proposals := self._candidates(situation, price[Action.GROW])):
            return None
        prices = torch.tensor([price[proposal.action] for proposal in proposals])
        forked = fork_proposals(proposals, situation, self.optimizer, self.course, policy.steps, policy.repeats)
        signal, gate = (estimate(changes).gain(prices.to(changes)) for changes in forked)
        best = int(signal.argmax())
        return proposals[best] if signal[best] > 0 and gate[best] > 0 else None

    def _candidates(self, situation: Situation, price: float) -> list[Proposal]:
        load, cost, allowed = situation.probe.signals.load, removals(situation.probe), situation.allowed
        busiest = sorted(allowed.proposals(Action.GROW), key=lambda proposal: -float(load[proposal.expert]))
        cheap = sorted(allowed.proposals(Action.PRUNE), key=lambda proposal: float(cost.change[proposal.expert]))
        cheap = [p for p in cheap if cost.change[p.expert] - 2 * cost.error[p.expert] <= price]
        return busiest[: self.policy.candidates] + cheap[: self.policy.candidates]


@dataclass(frozen=True)
class MeasuredPolicy(Policy):
    """Let measurements decide."""

    price: float  # nats per parameter
    candidates: int  # operations of each kind that are measured at most
    steps: int  # of training in each fork
    repeats: int  # of each fork, with other batches
    controller = MeasuringController


def _price(per_parameter: float, situation: Situation) -> dict[Action, float]:
    """Return what each action has to gain (nats): growth pays for an expert's parameters, and pruning earns them."""
    price = per_parameter * situation.probe.layer.weights(0).numel()
    return {Action.GROW: price, Action.PRUNE: -price}
