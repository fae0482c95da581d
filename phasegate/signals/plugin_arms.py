"""Build the arms that people describe in `params.yaml`: a signal from `plugins/` decides, and may come with a surgery.

A score's scale means nothing, so scores are standardised over the experts of the layer. An expert grows if its score
for growing lies more than `grow_above` standard deviations above the mean, and goes if its score for staying lies below
`prune_below`. Of all these experts, the one that is furthest beyond its threshold is chosen.

Shapes: E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from phasegate.model.classifier import Model
from phasegate.params import Params
from phasegate.params.plugins import Plugin
from phasegate.signals.published import plugin_signal
from phasegate.surgery.continuation import Arm
from phasegate.surgery.controllers import Action, Controller, Policy, Proposal, Situation, choose
from phasegate.surgery.surgeon import Treatment
from phasegate.training.course import Course


class SignalController(Controller):
    """Act on the standardised scores of a signal."""

    policy: "SignalPolicy"

    def __init__(self, policy: "SignalPolicy", model: Model, optimizer: Optimizer, course: Course) -> None:
        super().__init__(policy, model, optimizer, course)
        self.signal = plugin_signal(policy.signal)

    def propose(self, situation: Situation) -> Proposal | None:
        scores = self.signal(situation.probe, situation.draws)
        beyond = torch.zeros(situation.probe.layer.n_routed, 3, dtype=torch.float64)
        if scores.grow is not None:
            beyond[:, Action.GROW] = standardised(scores.grow) - self.policy.grow_above
        if scores.prune is not None:
            beyond[:, Action.PRUNE] = self.policy.prune_below - standardised(scores.prune)
        return choose(beyond.clamp(min=0), situation.allowed)


@dataclass(frozen=True)
class SignalPolicy(Policy):
    """Let the signal of a plugin decide; the thresholds are in standard deviations over the experts."""

    signal: Plugin
    grow_above: float
    prune_below: float
    controller = SignalController

    def files(self, seed: int) -> tuple[Path, ...]:
        return (self.signal.path,)


def plugin_arms(params: Params, phase: str, rates: Mapping[str, float] | None = None) -> dict[str, Arm]:
    """Return the arms that the parameters describe and that act in a phase: p7b, p7c2 or p7c3.

    Where classes arrive, growing adds all experts at once, and `rates` of expert matrices hold once it did.
    """
    arms = {}
    for name, arm in params.plugins.arms.items():
        if arm.phase == phase:
            policy = SignalPolicy(arm.find("signal"), arm.grow_above, arm.prune_below)
            treatment = Treatment(policy, arm.find("grow"), arm.find("prune"))
            if phase == "p7c2":
                rate = (rates or {}).get(arm.grow)
                treatment = replace(treatment, count=params.p7c.added(arm.grow), expert_rate=rate)
            arms[name] = Arm(treatment, dead=params.p7c3.dead if phase == "p7c3" else 0)
    return arms


def plugin_signals(params: Params) -> tuple[Plugin, ...]:
    """Return the signals that the arms use, each once."""
    return tuple(dict.fromkeys(arm.find("signal") for arm in params.plugins.arms.values()))


def standardised(scores: Tensor) -> Tensor:
    """Return scores (E,) as standard deviations from their mean, in float64 on the CPU; zeros where all are equal."""
    scores = scores.detach().double().cpu()
    return (scores - scores.mean()) / scores.std(correction=0).clamp(min=torch.finfo(scores.dtype).tiny)
