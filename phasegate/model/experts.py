"""Route tokens to experts and run these: by the compiled kernels where they suit, else in plain torch.

Slots are pairs of a token and one of its experts. They are sorted by expert, so that each expert is one matrix product.

Shapes: G gates, N tokens, K experts of each token, D model width, H expert width, E experts, F families, L inner nodes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from phasegate.kernels.functions import Mixture, Route, sort_slots, suit


class Sorted(NamedTuple):
    """Hold the order of slots by expert."""

    slot: Tensor  # (G * N * K,) the slot of each row
    place: Tensor  # (G * N * K,) the row of each slot
    ends: Tensor  # (E,) the end of each expert's rows
    counts: Tensor  # (E,) how many rows each expert has


Hyperplanes = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weights (L, D) and offsets (L,) of the inner nodes, and the tables that `MoE.refresh` derives from the paths."""


def route(
    x: Tensor, router: Tensor, bias: Tensor, hyperplanes: Hyperplanes, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Sorted]:
    """Return logits (G, N, F), gates, families and experts (G, N, K) of tokens x (G, N, D), and the sorted slots.

    The families with the greatest logit + bias (G, F) are chosen, of equal ones the lower index. Their gates are the
    softmax of their logits; a lone gate keeps its probability among all families, for the router's gradient (arXiv
    2101.03961). Logits and gates can be differentiated once, by x and by the router (G, F, D).
    """
    if suit(x):
        logits, gates, families, chosen, *rows = Route.apply(x, router, bias, *hyperplanes, top_k)  # type: ignore[no-untyped-call]
        return logits, gates, families, chosen, Sorted(*rows)
    logits = x @ router.transpose(1, 2)
    families = (logits.detach() + bias[:, None]).argsort(dim=-1, descending=True, stable=True)[..., :top_k]
    gates = logits.softmax(-1).gather(-1, families) if top_k == 1 else logits.gather(-1, families).softmax(-1)
    chosen = _descend(x, families, *hyperplanes)
    return logits, gates, families, chosen, sort(chosen, len(hyperplanes[3]) - len(hyperplanes[0]))


def _descend(x: Tensor, families: Tensor, weight: Tensor, offset: Tensor, root: Tensor, child: Tensor) -> Tensor:
    slots, n_nodes = root.take(families), len(weight)
    margins = x @ weight.T + offset
    for _ in range(n_nodes):
        margin = margins.gather(-1, slots.clamp(max=n_nodes - 1))
        slots = child.take(2 * slots + (margin > 0))  # experts lead to themselves
    return slots - n_nodes


def sort(experts: Tensor, n_experts: int) -> Sorted:
    """Sort slots by their expert, `experts` (any shape); equal ones keep their order."""
    experts = experts.flatten()
    if suit(torch.empty(0, device=experts.device)):
        return Sorted(*sort_slots(experts, n_experts))
    order = experts.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    counts = torch.zeros(n_experts, dtype=order.dtype, device=order.device)
    counts = counts.scatter_add(0, experts, torch.ones_like(experts))  # an export can't trace `bincount`
    return Sorted(order, place, counts.cumsum(0), counts)


def mixture(x: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, rows: Sorted) -> Tensor:
    """Return for each token x (N, D) the sum of the outputs of its experts, weighted by gates (N, K) -> (N, D).

    Weights are (E, D, H) and (E, H, D). Terms are summed by rank. The kernel can be differentiated once.
    """
    if suit(x):
        mixed: Tensor = Mixture.apply(x, gates, w_in, w_out, *rows[:3])  # type: ignore[no-untyped-call]
        return mixed
    hidden = _grouped(x[rows.slot // gates.shape[1]], w_in, rows.counts).relu()
    outputs = _grouped(hidden, w_out, rows.counts)[rows.place].view(*gates.shape, x.shape[1])
    return (outputs * gates.unsqueeze(-1)).sum(1)


def _grouped(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Multiply rows x (M, A), grouped by expert, by their expert's weights (E, A, B) -> (M, B)."""
    groups = torch.split(x, counts.tolist())
    return torch.cat([rows @ weight for rows, weight in zip(groups, weights, strict=True)])
