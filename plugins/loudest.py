"""An example of a signal of your own: how much of the layer's output an expert contributes."""

import torch

from phasegate.plugin import Probe, Scores


def signal(probe: Probe, draws: torch.Generator) -> Scores:
    """Return the summed norms of what each expert adds to its tokens, gates included, (E,)."""
    loudness = probe.per_expert(probe.contributions.norm(dim=-1))
    return Scores(prune=loudness, grow=loudness)
