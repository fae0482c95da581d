"""Carry Adam's moments through surgery.

A surgery is one index vector per axis of a layer: new row i is a copy of old row `source[i]`, or FRESH. The same gather
runs over every tensor that has the axis (`moe.AXES`) and over its moments. So an expert that surgery does not touch
keeps its weights and moments to the bit.

A copy that gets a share r of the tokens has r times the gradient. So its first moment is r times its parent's, and its
second r * r times: as they stood, they would divide its learning rate by 1 / r for a thousand steps.

Fresh rows have no past. They begin with zero momentum, and with the mean second moment of the other rows. A hyperplane
acts as a router row inside its family, so it begins with the second moment of the family's router row. Zeroed second
moments under a large step count would make Adam's first update about 0.1 / sqrt(0.001) = 3.2 times the learning rate.
A step count of their own would make it the learning rate itself, some four times what trained rows move.
"""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from phasegate.model.classifier import Network
from phasegate.model.moe import AXES, MoE

FRESH = -1


def rebuild(moe: MoE, optimizer: Optimizer | None, sources: dict[str, list[int]]) -> None:
    """Gather a layer's tensors and their moments by `sources`: axis name -> for each new row the old row, or FRESH."""
    for name, axes in AXES.items():
        dims = {dim: sources[axis] for dim, axis in enumerate(axes) if axis in sources}
        if not dims:
            continue
        old = getattr(moe, name)
        new = old.detach()
        for dim, source in dims.items():
            new = take(new, dim, source)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            if optimizer is not None:
                carry_state(optimizer, old, new, dims)
        setattr(moe, name, new)


def take(tensor: Tensor, dim: int, source: list[int]) -> Tensor:
    """Gather the rows `source` of a tensor along `dim`; FRESH rows are zero."""
    blank = tensor.new_zeros(*tensor.shape[:dim], 1, *tensor.shape[dim + 1 :])
    index = torch.tensor(source, dtype=torch.int64, device=tensor.device) % (tensor.shape[dim] + 1)
    return torch.cat([tensor, blank], dim).index_select(dim, index)


def carry_state(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, sources: dict[int, list[int]]) -> None:
    """Put `new` in the place of `old` in the optimizer, and gather its moments as its rows were gathered.

    The parameter is replaced, never resized in place: that would break any graph which still holds it.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, None)
    if not state or any(set(source) <= {FRESH} for source in sources.values()):
        return  # no row is left to learn from: the parameter starts anew, step count included
    for dim, source in sources.items():
        state = {key: value if value.dim() == 0 else take(value, dim, source) for key, value in state.items()}
        rows = state["exp_avg_sq"].movedim(dim, 0)
        fresh = torch.tensor(source, device=rows.device) == FRESH
        if fresh.any():
            rows[fresh] = rows[~fresh].mean(0)
    optimizer.state[new] = state


def prime_hyperplane(moe: MoE, optimizer: Optimizer | None, family: int) -> None:
    """Give the layer's last hyperplane the second moment of its family's router row, and no momentum."""
    row = optimizer.state.get(moe.router) if optimizer else None
    if optimizer is None or not row or not moe.node_weight.requires_grad:
        return
    peers = row["exp_avg_sq"][:, family].mean(0)  # (D,)
    for parameter, second in ((moe.node_weight, peers), (moe.node_offset, peers.mean())):
        state = optimizer.state[parameter]
        if not state:  # the layer's first hyperplane
            blank = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            state |= {"step": row["step"].clone(), **blank}
        state["exp_avg_sq"][-1] = second


def scale_moments(moe: MoE, optimizer: Optimizer | None, axis: str, factors: dict[int, float]) -> None:
    """Make the moments of an axis's rows those of a gradient that is `factors` (row -> factor) times as large."""
    for name, axes in AXES.items():
        state = optimizer.state.get(getattr(moe, name)) if optimizer else None
        if state and axis in axes:
            for row, factor in factors.items():
                state["exp_avg"].select(axes.index(axis), row).mul_(factor)
                state["exp_avg_sq"].select(axes.index(axis), row).mul_(factor * factor)


def expert_tensors(moe: MoE, optimizer: Optimizer | None) -> tuple[list[Tensor], list[Tensor]]:
    """List the learned tensors that have a row per expert, and their moments."""
    weights, moments = list[Tensor](), list[Tensor]()
    for name, axes in AXES.items():
        parameter = getattr(moe, name)
        if axes[0] == "expert" and isinstance(parameter, nn.Parameter):
            weights.append(parameter.detach())
            state = optimizer.state.get(parameter, {}) if optimizer else {}
            moments += [value for value in state.values() if value.dim()]
    return weights, moments


def set_expert_rate(model: Network, optimizer: Optimizer, factor: float) -> None:
    """Let the matrices of routed experts learn at `factor` times the rate of all other parameters."""
    experts = [weights for moe in model.layers for weights in (moe.w_in, moe.w_out)]
    apart = {id(weights) for weights in experts}
    group = next(group for group in optimizer.param_groups if id(experts[0]) in map(id, group["params"]))
    if len(group["params"]) > len(experts):
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in apart]
        optimizer.param_groups.append(group := {**group, "params": experts})
    group["lr_factor"] = factor
