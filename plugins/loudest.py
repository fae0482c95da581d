"""An example of a signal of one's own: how much of the layer's output an expert makes up."""

import torch

from phasegate.importance import Scores
from phasegate.probe import Probe


def signal(probe: Probe, draws: torch.Generator) -> Scores:
    """The summed norms of what each expert adds to its tokens, gates included, (E,)."""
    loudness = probe.per_expert(probe.contributions.norm(dim=-1))
    return Scores(prune=loudness, grow=loudness)
