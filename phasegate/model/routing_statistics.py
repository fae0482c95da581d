"""Compute statistics of a layer's routing: the features and signals that controllers read.

Shapes: N tokens, D width, E experts, F families, K chosen.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from phasegate.model.kernels.functions import product
from phasegate.model.moe import Routing, routing_entropy

N_SCALARS = 3  # features of an expert besides its mean token


class ExpertSignals(NamedTuple):
    """Hold statistics of each expert in one routed batch. They hold the graph unless computed without one."""

    load: Tensor  # (E,) share of the N*K token slots
    gate: Tensor  # (E,) mean mixture weight over the expert's tokens
    entropy: Tensor  # (E,) mean routing entropy of the expert's tokens, 0 to 1
    token: Tensor  # (E, D) mean of the expert's tokens
    batch_entropy: Tensor  # () mean routing entropy of all tokens, 0 to 1


def expert_signals(routing: Routing, n_routed: int) -> ExpertSignals:
    """Compute the statistics of the first gate's routing; an expert without tokens has zeros."""
    experts, gates, tokens = routing.experts[0], routing.gates[0], routing.tokens[0]
    entropy = routing_entropy(routing.probs[0])  # (N,)
    visits = torch.zeros(len(tokens), n_routed, device=tokens.device, dtype=tokens.dtype)
    visits = visits.scatter(1, experts, 1.0)  # (N, E) 1 where the token runs the expert
    weights = torch.zeros_like(visits).scatter(1, experts, gates)
    count = visits.sum(0)  # (E,)
    safe = count.clamp(min=1)
    return ExpertSignals(
        load=count / experts.numel(),
        gate=weights.sum(0) / safe,
        entropy=product(visits.T, entropy[:, None])[:, 0] / safe,
        token=product(visits.T, tokens) / safe[:, None],
        batch_entropy=entropy.mean(),
    )


def features(signals: ExpertSignals) -> Tensor:
    """Return what a control head reads of each expert: (E, D + N_SCALARS), all of order one.

    Load is relative to an even share. Entropy is relative to the batch's, in tenths.
    """
    ratio = signals.entropy / signals.batch_entropy.clamp(min=1e-12)
    scalars = torch.stack([signals.load * len(signals.load), signals.gate, 10 * (ratio - 1)], dim=1)
    return torch.cat([signals.token, scalars], dim=1)


def routing_kl(before: Tensor, after: Tensor, family_source: tuple[int, ...]) -> float:
    """Return the mean KL divergence (nats) of the routing distributions before (N, F) and after (N, F') a surgery.

    The distribution with fewer families comes first, so that the divergence is finite. `family_source` has for each
    family after the surgery its index before, or -1 if it is new.
    """
    kept = [(new, old) for new, old in enumerate(family_source) if old >= 0]
    p, q = before[:, [old for _, old in kept]], after[:, [new for new, _ in kept]]
    if before.shape[1] > after.shape[1]:
        p, q = q, p
    tiny = torch.finfo(p.dtype).tiny  # the tails of a softmax can underflow to zero, and count nothing then
    return float((p * (p.clamp(min=tiny) / q.clamp(min=tiny)).log()).sum(-1).mean().clamp(min=0))
