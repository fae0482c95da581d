"""An example of a surgery of your own: a copy that starts a little away from its parent."""

import torch

from phasegate.plugin import ExpertManager, Probe, Surgery

NOISE = 0.1  # relative to the weights


def operate(manager: ExpertManager, expert: int, probe: Probe, draws: torch.Generator) -> Surgery:
    """Clone the expert (a stable id), then add noise to the copy, which is the layer's last expert."""
    surgery = manager.clone(expert)
    with torch.no_grad():
        for weights in (manager.moe.w_in[-1], manager.moe.w_out[-1]):
            weights += NOISE * weights.std() * torch.randn(weights.shape, generator=draws).to(weights)
    return surgery
