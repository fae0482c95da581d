"""An example of a surgery of one's own: a copy that begins a little away from its parent."""

import torch

from phasegate.expert_manager import ExpertManager, Surgery
from phasegate.moe import uniform
from phasegate.probe import Probe

NOISE = 0.1  # of a fresh expert's weights


def operate(manager: ExpertManager, expert: int, probe: Probe, draws: torch.Generator) -> Surgery:
    """Clone the expert (a stable id), then add noise to the copy, which is the layer's last expert."""
    surgery = manager.clone(expert)
    layer = manager.moe
    with torch.no_grad():
        for weights in (layer.w_in[-1], layer.w_out[-1]):
            weights += NOISE * uniform(tuple(weights.shape), weights.shape[0], draws).to(weights)
    return surgery
