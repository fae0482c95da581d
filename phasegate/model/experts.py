"""Route tokens to experts and run these: by the compiled kernels where they suit, else in plain torch.

Shapes: G gates, N tokens, K experts of each token, D model width, H expert width, E experts, F families, L inner nodes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phasegate.model.kernels.functions import Mix, Route, run_experts, suit, without_autocast

Hyperplanes = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weights (L, D) and offsets (L,) of the inner nodes, and the tables that `MoE.refresh` derives from the paths."""


class Routed(NamedTuple):
    """Hold how tokens were routed."""

    logits: Tensor  # (G, N, F)
    gates: Tensor  # (G, N, K)
    weights: Tensor  # (G, N, K) the gates again; through them the hyperplanes learn
    families: Tensor  # (G, N, K)
    experts: Tensor  # (G, N, K)


@without_autocast
def route(x: Tensor, router: Tensor, bias: Tensor, hyperplanes: Hyperplanes, top_k: int) -> Routed:
    """Route tokens x (G, N, D) by a router (G, F, D).

    The families with the greatest logit + bias (G, F) are chosen, of equal ones the lower index. Their gates are the
    softmax of their logits; a lone gate keeps its probability among all families, for the router's gradient (arXiv
    2101.03961). The kernel can be differentiated once, by logits, gates and weights. Through the weights the
    hyperplanes learn if they need a gradient: see `_descend`. ValueError unless there are `top_k` families to choose,
    and for tokens that are not (G, N, D).
    """
    (n_gates, n_families, width), (weight, offset, root, child) = router.shape, hyperplanes
    if not 1 <= top_k <= n_families:
        raise ValueError(f"top_k is {top_k}: it must lie between 1 and the {n_families} families that may be chosen")
    if x.dim() != 3 or x.shape[::2] != (n_gates, width):
        raise ValueError(f"tokens have shape {tuple(x.shape)}: it must be ({n_gates}, N, {width}) for these routers")
    n_nodes, fit = weight.shape[0], bias.shape == (n_gates, n_families) and root.shape == (n_families,)
    fit = fit and weight.shape == (n_nodes, width) and offset.shape == (n_nodes,)
    fit = fit and child.shape[1:] == (2,) and child.shape[0] > n_nodes
    if fit and suit(x, router, bias, weight, offset, indices=(root, child)):
        return Routed(*Route.apply(x, router, bias, *hyperplanes, top_k))  # type: ignore[no-untyped-call]
    logits = x @ router.transpose(1, 2)
    families = (logits.detach() + bias[:, None]).argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    gates = logits.softmax(-1).gather(-1, families) if top_k == 1 else logits.gather(-1, families).softmax(-1)
    experts, teaching = _descend(x, families, *hyperplanes)
    return Routed(logits, gates, gates * teaching, families, experts)


@without_autocast
def mix(x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    """Run the experts (G, N, K) of tokens x (G, N, D), and sum what these put out by rank, weighted (G, N, K).

    Weights (E, D, H) and (E, H, D). Returns the sums (G, N, D) and how many slots ran each expert (E,).
    """
    if weights.shape == experts.shape and _suit(x, experts, w_in, w_out, weights):
        mixed: tuple[Tensor, Tensor] = Mix.apply(x, weights, experts, w_in, w_out)  # type: ignore[no-untyped-call]
        return mixed
    outputs = run(x.flatten(0, 1), experts.flatten(0, 1), w_in, w_out)
    y = (outputs * weights.flatten(0, 1).unsqueeze(-1)).sum(1)
    ones = torch.ones_like(experts).flatten()  # an export can't trace `bincount`
    counts = ones.new_zeros(w_in.shape[0]).scatter_add(0, experts.flatten(), ones)
    return y.view_as(x), counts


def _descend(
    x: Tensor, families: Tensor, weight: Tensor, offset: Tensor, root: Tensor, child: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the expert that each chosen family runs (G, N, K), and a factor of value one that trains hyperplanes.

    The factor is r / stop_gradient(r). r is the product of sigmoid(signed margin) along the path.
    """
    slots, n_nodes, log_r = root.take(families), weight.shape[0], x.new_zeros(families.shape)
    margins = x @ weight.T + offset
    if not weight.requires_grad:
        margins = margins.detach()
    for _ in range(n_nodes):  # experts lead to themselves
        margin = margins.gather(-1, slots.clamp(max=n_nodes - 1))
        log_r = log_r + torch.where(slots < n_nodes, F.logsigmoid(margin.abs()), 0)
        slots = child.take(2 * slots + (margin > 0))
    return slots - n_nodes, (log_r - log_r.detach()).exp()


@without_autocast
def run(x: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Return the ungated outputs of the experts (N, K) of tokens x (N, D) -> (N, K, D); no gradient from the kernel."""
    if _suit(x, experts, w_in, w_out):
        return run_experts(x, experts, w_in, w_out)
    order = experts.flatten().argsort(stable=True)
    ones = torch.ones_like(order)
    counts = ones.new_zeros(w_in.shape[0]).scatter_add(0, experts.flatten(), ones).tolist()
    groups = torch.split(x[order // experts.shape[1]], counts)
    y = torch.cat([(rows @ first).relu() @ last for rows, first, last in zip(groups, w_in, w_out, strict=True)])
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return y[place].view(*experts.shape, x.shape[1])


def _suit(x: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor, *others: Tensor) -> bool:
    """Tell whether the kernels run experts (..., K) on tokens x (..., D)."""
    n_experts, width, inside = w_in.shape
    fit = w_out.shape == (n_experts, inside, width) and x.shape == (*experts.shape[:-1], width) and experts.shape[-1]
    return bool(fit) and suit(x, w_in, w_out, *others, indices=(experts,))
