"""Route tokens to experts and run these: by the compiled kernels where they suit, else in plain torch.

Shapes: G gates, N tokens, K experts of each token, D model width, H expert width, E experts, F families, L inner nodes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phasegate.model.kernels.functions import Layer, run_experts, suit

Hyperplanes = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weights (L, D) and offsets (L,) of the inner nodes, and the tables that `MoE.refresh` derives from the paths."""


class Routed(NamedTuple):
    """Hold what a layer puts out, and how it got there."""

    y: Tensor  # (G, N, D) the mixture
    logits: Tensor  # (G, N, F)
    gates: Tensor  # (G, N, K)
    families: Tensor  # (G, N, K)
    experts: Tensor  # (G, N, K)
    counts: Tensor  # (E,) how many slots run each expert


def layer(
    x: Tensor, router: Tensor, bias: Tensor, hyperplanes: Hyperplanes, w_in: Tensor, w_out: Tensor, top_k: int
) -> Routed:
    """Route tokens x (G, N, D), run their experts, and sum the outputs by rank, weighted by gates.

    The families with the greatest logit + bias (G, F) are chosen, of equal ones the lower index. Their gates are the
    softmax of their logits; a lone gate keeps its probability among all families, for the router's gradient (arXiv
    2101.03961). Router (G, F, D), weights (E, D, H) and (E, H, D). The kernel can be differentiated once, by mixture,
    logits and gates. Through the mixture the hyperplanes learn if they need a gradient: see `_teaching`.
    """
    if suit(x):
        return Routed(*Layer.apply(x, router, bias, *hyperplanes, w_in, w_out, top_k))  # type: ignore[no-untyped-call]
    logits = x @ router.transpose(1, 2)
    families = (logits.detach() + bias[:, None]).argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    gates = logits.softmax(-1).gather(-1, families) if top_k == 1 else logits.gather(-1, families).softmax(-1)
    experts, teaching = _descend(x, families, *hyperplanes)
    outputs = run(x.flatten(0, 1), experts.flatten(0, 1), w_in, w_out)
    y = (outputs * (gates * teaching).flatten(0, 1).unsqueeze(-1)).sum(1)
    ones = torch.ones_like(experts).flatten()  # an export can't trace `bincount`
    counts = ones.new_zeros(len(w_in)).scatter_add(0, experts.flatten(), ones)
    return Routed(y.view_as(x), logits, gates, families, experts, counts)


def _descend(
    x: Tensor, families: Tensor, weight: Tensor, offset: Tensor, root: Tensor, child: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the expert that each chosen family runs (G, N, K), and a factor of value one that trains hyperplanes.

    The factor is r / stop_gradient(r). r is the product of sigmoid(signed margin) along the path.
    """
    slots, n_nodes, log_r = root.take(families), len(weight), x.new_zeros(families.shape)
    margins = x @ weight.T + offset
    if not weight.requires_grad:
        margins = margins.detach()
    for _ in range(n_nodes):  # experts lead to themselves
        margin = margins.gather(-1, slots.clamp(max=n_nodes - 1))
        log_r = log_r + torch.where(slots < n_nodes, F.logsigmoid(margin.abs()), 0)
        slots = child.take(2 * slots + (margin > 0))
    return slots - n_nodes, (log_r - log_r.detach()).exp()


def run(x: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Return the ungated outputs of the experts (N, K) of tokens x (N, D) -> (N, K, D); no gradient from the kernel."""
    if suit(x):
        return run_experts(x, experts, w_in, w_out)
    order = experts.flatten().argsort(stable=True)
    ones = torch.ones_like(order)
    counts = ones.new_zeros(len(w_in)).scatter_add(0, experts.flatten(), ones).tolist()
    groups = torch.split(x[order // experts.shape[1]], counts)
    y = torch.cat([(rows @ first).relu() @ last for rows, first, last in zip(groups, w_in, w_out, strict=True)])
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return y[place].view(*experts.shape, x.shape[1])
