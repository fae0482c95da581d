"""Arms of one's own, as `params.yaml` describes them: a signal from `plugins/` decides, and surgery may be one too.

A score's scale means nothing, so it is standardised over the experts of the layer: an expert grows if its score for
growing lies more than `grow_above` standard deviations above their mean, and goes if its score for staying lies
below `prune_below`. Of the experts that may, the one that is furthest beyond its threshold is chosen.

Shapes: E experts.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phasegate.control import GROW, PRUNE, Control, Controller, Proposal, Situation, surest
from phasegate.importance import own_signal
from phasegate.params import Params
from phasegate.phase import Arm
from phasegate.plugins import Plugin
from phasegate.surgeon import Treatment


class SignalController(Controller):
    """Acts on the standardised scores of a signal."""

    def __init__(self, control: "SignalControl") -> None:
        self.control, self._signal = control, own_signal(control.signal)

    def propose(self, situation: Situation) -> Proposal | None:
        """The expert furthest beyond its threshold, if any is."""
        scores = self._signal(situation.probe, situation.draws)
        beyond = torch.zeros(situation.probe.layer.n_routed, 3, dtype=torch.float64)
        if scores.grow is not None:
            beyond[:, GROW] = standardised(scores.grow) - self.control.grow_above
        if scores.prune is not None:
            beyond[:, PRUNE] = self.control.prune_below - standardised(scores.prune)
        return surest(beyond.clamp(min=0), situation.allowed)


@dataclass(frozen=True)
class SignalControl(Control):
    """A signal of one's own decides; the thresholds are in standard deviations over the experts."""

    signal: Plugin
    grow_above: float
    prune_below: float

    def build(self, width: int, seed: int, device: torch.device) -> Controller:
        """The controller of one layer."""
        return SignalController(self)

    def files(self, seed: int) -> tuple[Path, ...]:
        """The signal's."""
        return (self.signal.path,)


def arms(params: Params) -> list[Arm]:
    """The arms that the parameters describe, the first of which decides the phase."""
    return [
        Arm(
            name,
            Treatment(SignalControl(arm.signal_plugin, arm.grow_above, arm.prune_below), arm.grow_by, arm.prune_by),
        )
        for name, arm in params.own.arms.items()
    ]


def signals(params: Params) -> tuple[Plugin, ...]:
    """The signals that the arms use, each once."""
    return tuple(dict.fromkeys(arm.signal_plugin for arm in params.own.arms.values()))


def standardised(scores: Tensor) -> Tensor:
    """Scores (E,) as standard deviations from their mean, in float64 on the CPU; zeros where all are equal."""
    scores = scores.detach().double().cpu()
    return (scores - scores.mean()) / scores.std(correction=0).clamp(min=torch.finfo(scores.dtype).tiny)
