"""Describe experts by features, from which a head predicts how surgery changes the loss.

Shapes: E experts, F features.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

from phasegate.model.moe import relative_distance
from phasegate.signals.published import gate_times_norm, gradmax, taylor_saliency
from phasegate.signals.roots import root
from phasegate.surgery.controllers import Situation
from phasegate.surgery.operations import ExpertManager
from phasegate.surgery.probe import Probe
from phasegate.training.course import Course


class Change(IntEnum):
    """Name a change of the loss: by a removal immediately, by a removal after training, by a split after training."""

    PRUNE = 0
    RECOVERED = 1
    GROW = 2


CHANGES = tuple(change.name.lower() for change in Change)
FEATURES: tuple[str, ...] = ("load", "gate", "entropy", "relative_entropy", "output", "weights_in", "weights_out")
FEATURES += ("saliency", "relative_saliency", "relative_gradient", "age", "has_sibling", "sibling_distance")
FEATURES += ("layer_entropy", "layer_experts", "model_loss", "progress")
"""What a head reads of each expert; the last four are the same for all experts of a layer."""


def situation_features(situation: Situation, course: Course) -> Tensor:
    """Return the features (E, F) of the experts of a layer in training, from the gate split."""
    probe = Probe(situation.probe.model, situation.probe.block, course.gate)
    return describe(probe, situation.ages, situation.step / course.schedule.steps)


@torch.no_grad()
def describe(probe: Probe, ages: Tensor, progress: float) -> Tensor:
    """Return the features (E, F) of a layer's experts, whose ages (E,) are steps, at a share of the phase."""
    layer, draws = probe.layer, torch.Generator()  # none of the signals read here draws
    signals = probe.signals
    saliency, output = taylor_saliency(probe, draws).prune, gate_times_norm(probe, draws).prune
    gradient = gradmax(probe, draws).grow
    assert saliency is not None and output is not None and gradient is not None
    ids = layer.expert_id.tolist()
    siblings = [ExpertManager(layer).sibling(expert) for expert in ids]
    distances = [
        0.0 if other is None else relative_distance(layer.weights(e), layer.weights(ids.index(other)))
        for e, other in enumerate(siblings)
    ]
    columns = [
        signals.load * layer.n_routed,
        signals.gate,
        signals.entropy,
        10 * (signals.entropy / signals.batch_entropy.clamp(min=1e-12) - 1),
        _relative(output),
        _relative(root(layer.w_in.square().sum((1, 2)))),
        _relative(root(layer.w_out.square().sum((1, 2)))),
        saliency.clamp(min=1e-6).log(),
        _relative(saliency),
        _relative(gradient),
        ages.to(saliency).clamp(min=1).log(),
        torch.tensor([float(other is not None) for other in siblings]).to(saliency),
        torch.tensor(distances).to(saliency),
    ]
    shared = [float(signals.batch_entropy), math.log(layer.n_routed), float(probe.losses.mean()), progress]
    return torch.stack([*columns, *(torch.full_like(saliency, value) for value in shared)], dim=1)


def _relative(values: Tensor) -> Tensor:
    """Return the logarithm of values (E,) relative to their mean; a hundredth of the mean at least."""
    return (values / values.mean().clamp(min=torch.finfo(values.dtype).tiny)).clamp(min=0.01).log()
