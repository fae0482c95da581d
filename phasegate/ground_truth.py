"""Controllers of phase 7b.4, which go by the change of loss that an operation brings: predicted, or measured.

An operation is worth doing if the loss falls by more than a price and two standard errors of the change. The price is
per parameter: growth pays it, and pruning earns it. Labels come from the signal split, and the gate split decides
whether to act, so that no controller trusts the examples by which it chose.

Shapes: E experts, C changes (`counterfactual_head.CHANGES`).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phasegate.control import Control, Controller, Proposal, Situation
from phasegate.counterfactual import Estimate, estimate
from phasegate.counterfactual_head import GROW, HEAD, RECOVERED, CounterfactualHead, load_head


class PredictingController(Controller):
    """Does what a head predicts to gain most, of what is allowed, if it gains for certain.

    Args:
        price: nats per parameter.
        acts: if not, the head predicts in vain: the control of whatever predicting itself might do.
    """

    def __init__(self, head: CounterfactualHead, price: float, acts: bool) -> None:
        self.head, self.price, self.acts = head, price, acts

    def propose(self, situation: Situation) -> Proposal | None:
        """The most certain gain, if there is any."""
        predicted = self.head.predict(situation.features())
        price, allowed = self.price * situation.expert_size, situation.allowed
        grow = Estimate(predicted.change[:, GROW], predicted.error[:, GROW]).gain(price).cpu()
        prune = Estimate(predicted.change[:, RECOVERED], predicted.error[:, RECOVERED]).gain(-price).cpu()
        gains = {Proposal("grow", e): float(grow[e]) for e in indices(allowed.grow)}
        gains |= {Proposal("prune", e): float(prune[e]) for e in indices(allowed.prune)}
        best = max(gains, key=lambda proposal: gains[proposal], default=None)
        return best if self.acts and best is not None and gains[best] > 0 else None


class MeasuringController(Controller):
    """Measures the most promising operations by forks, and does the best if it gains for certain on both splits.

    Those to grow are the busiest experts; those to prune cost least at once, and do not for certain cost more than
    they are paid for: training has never been seen to make that good.

    Args:
        price: nats per parameter.
        candidates: operations of each kind that are measured at most.
        steps: of training in each fork.
        repeats: of each fork, with other batches.
    """

    def __init__(self, price: float, candidates: int, steps: int, repeats: int) -> None:
        self.price, self.candidates, self.steps, self.repeats = price, candidates, steps, repeats

    def propose(self, situation: Situation) -> Proposal | None:
        """The operation with the most certain gain on the signal split, if it gains for certain on the gate split."""
        price = self.price * situation.expert_size
        proposals = self._promising(situation, price)
        if not proposals:
            return None
        prices = torch.tensor([price if proposal.action == "grow" else -price for proposal in proposals])
        forked = situation.forks(proposals, self.steps, self.repeats)
        signal, gate = (estimate(changes).gain(prices.to(changes)) for changes in forked)
        best = int(signal.argmax())
        return proposals[best] if signal[best] > 0 and gate[best] > 0 else None

    def _promising(self, situation: Situation, price: float) -> list[Proposal]:
        load, removals = situation.signals.load, situation.removals()
        busiest = sorted(indices(situation.allowed.grow), key=lambda e: -float(load[e]))
        cheap = sorted(indices(situation.allowed.prune), key=lambda e: float(removals.change[e]))
        cheap = [e for e in cheap if removals.change[e] - 2 * removals.error[e] <= price]
        grow = [Proposal("grow", e) for e in busiest[: self.candidates]]
        return grow + [Proposal("prune", e) for e in cheap[: self.candidates]]


@dataclass(frozen=True)
class PredictedControl(Control):
    """The head of a trial's seed, trained on the surveys of all other seeds, decides."""

    heads: Path  # holds seed-0, seed-1, ...
    price: float
    acts: bool = True

    def build(self, width: int, seed: int, device: torch.device) -> Controller:
        """The controller of one layer."""
        return PredictingController(load_head(self.heads / f"seed-{seed}").to(device), self.price, self.acts)

    def files(self, seed: int) -> tuple[Path, ...]:
        """The head of the seed."""
        return (self.heads / f"seed-{seed}" / HEAD,)


@dataclass(frozen=True)
class MeasuredControl(Control):
    """Measurements decide."""

    price: float
    candidates: int
    steps: int
    repeats: int

    def build(self, width: int, seed: int, device: torch.device) -> Controller:
        """The controller of one layer."""
        return MeasuringController(self.price, self.candidates, self.steps, self.repeats)


def indices(mask: Tensor) -> list[int]:
    """Where a mask (E,) holds."""
    return [int(e) for e in mask.nonzero().flatten()]
