"""Compute the losses of training, and balance the load of experts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from phasegate.model.classifier import Network, Output
from phasegate.model.kernels.functions import Balance, suit
from phasegate.model.moe import Routing

Objective = Callable[[Tensor, Tensor, int], Tensor]
"""Inputs x (B, ...), labels y (B,), step -> loss."""


def load_balance(routing: Routing) -> Tensor:
    """Return Switch's loss: F * sum over families of (share of slots) * (mean probability); one if even.

    It is summed over gates, so that no gate's router is pressed less because there are others.
    """
    fit = routing.families.dim() == 3 and routing.families.shape[:2] == routing.logits.shape[:2]
    if fit and suit(routing.logits, indices=(routing.families,)):
        loss: Tensor = Balance.apply(routing.logits, routing.families)  # type: ignore[no-untyped-call]
        return loss
    families, tokens = routing.logits.shape[-1], routing.logits.shape[1]
    return (routing.probs.sum(1) * shares(routing)).sum() * (families / tokens)


def router_z(routing: Routing) -> Tensor:
    """Return ST-MoE's z-loss: the mean squared log-partition of a router's scores, summed over gates (2202.08906)."""
    return routing.logits.logsumexp(-1).square().mean(-1).sum()


def shares(routing: Routing) -> Tensor:
    """Return the share of the token slots that each family got, (G, F)."""
    chosen = routing.families.flatten(1)
    slots = routing.logits.new_zeros(chosen.shape[0], routing.logits.shape[-1])
    return slots.scatter_add(1, chosen, torch.ones_like(chosen, dtype=slots.dtype)) / chosen.shape[1]


@torch.no_grad()
def nudge_selection(model: Network, output: Output) -> None:
    """Raise the selection bias of families below an even share and lower the others' (arXiv 2408.15664)."""
    if model.architecture and model.architecture.balance_bias:
        for moe, routing in zip(model.layers, output.routings, strict=True):
            share = shares(routing)
            excess = share - 1 / share.shape[-1]
            moe.selection_bias[: share.shape[0]] -= model.architecture.balance_bias * excess.sign()


def main_loss(model: Network, output: Output, y: Tensor, label_smoothing: float) -> Tensor:
    """Return the first task's cross-entropy (nats) plus, for a mixture of experts, the terms that balance its load."""
    loss = F.cross_entropy(output.logits[0], y, label_smoothing=label_smoothing)
    if not (arch := model.architecture):
        return loss
    penalty: Tensor | float = 0.0
    for routing in output.routings:
        if arch.balance_loss:
            penalty = penalty + arch.balance_loss * load_balance(routing)
        if arch.z_loss:
            penalty = penalty + arch.z_loss * router_z(routing)
    return loss + penalty


def plain_objective(model: Network, label_smoothing: float) -> Objective:
    """Return the objective of training with nothing added; it also balances the load as the architecture asks."""

    def objective(x: Tensor, y: Tensor, step: int) -> Tensor:
        output = model(x)
        nudge_selection(model, output)
        return main_loss(model, output, y, label_smoothing)

    return objective
