"""Surgery: grow and prune the experts of a MoE layer in the middle of training, together with the optimizer.

A surgery is one index vector per axis. New expert i is a copy of old expert `src[i]`, and the same gather runs
over *every* tensor that has that axis (`moe.AXES`) and over its Adam moments, so untouched experts stay bitwise
what they were. An index of -1 asks for a fresh row.

Fresh rows begin with zero momentum and with the second moment of their peers. Zeroed second moments under a
large step count would make Adam's first update about 0.1 / sqrt(0.001) = 3.2 times the learning rate.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from phasegate.moe import AXES, MoE, uniform

FRESH = -1


class SurgeryRefused(ValueError):
    """An operation that would break the layer; nothing was changed."""


@dataclass(frozen=True)
class Surgery:
    """What was done to one layer."""

    operation: str
    expert: int  # stable id of the expert that came (grow) or went (prune)
    parent: int | None  # stable id of the expert it was made from, if any
    family_source: tuple[int, ...]  # for each family now, its index before; FRESH if it is new
    n_routed_before: int
    n_routed_after: int


def rebuild(moe: MoE, optimizer: Optimizer | None, sources: dict[str, list[int]]) -> None:
    """Gather every tensor of the layer, and its optimizer state, along the axes named in `sources`.

    Args:
        sources: axis name ("expert", "family", "node" or "gate") -> for each new row the old row, or FRESH.
    """
    for name, axes in AXES.items():
        dims = {axis: dim for dim, axis in enumerate(axes) if axis in sources}
        if not dims:
            continue
        old = getattr(moe, name)
        new = old.detach()
        for axis, dim in dims.items():
            new = take(new, dim, sources[axis])
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            if optimizer is not None:
                carry_state(optimizer, old, new, {dim: sources[axis] for axis, dim in dims.items()})
        setattr(moe, name, new)


def take(tensor: Tensor, dim: int, source: list[int]) -> Tensor:
    """Rows `source` of a tensor along `dim`; FRESH rows are zero."""
    index = torch.tensor(source, dtype=torch.int64, device=tensor.device)
    fresh = index == FRESH
    if tensor.shape[dim] == 0:
        return tensor.new_zeros(*tensor.shape[:dim], len(source), *tensor.shape[dim + 1 :])
    rows = tensor.index_select(dim, index.clamp(min=0))
    return rows.index_fill(dim, fresh.nonzero().flatten(), 0) if fresh.any() else rows


def carry_state(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, sources: dict[int, list[int]]) -> None:
    """Put `new` in the place of `old` in the optimizer, its moments gathered as its rows were.

    The parameter is replaced, never resized in place: that would break any graph which still holds it.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    if any(set(source) <= {FRESH} for source in sources.values()):
        return  # no row is left to learn from: the parameter starts anew, step count included
    for dim, source in sources.items():
        state = {key: value if value.dim() == 0 else take(value, dim, source) for key, value in state.items()}
        rows = state["exp_avg_sq"].movedim(dim, 0)
        fresh = torch.tensor(source, device=rows.device) == FRESH
        if fresh.any():
            rows[fresh] = rows[~fresh].mean(0)
    optimizer.state[new] = state


class ExpertManager:
    """The operations on one layer and the optimizer that trains it. Experts are named by stable id.

    Each operation returns what it did, or raises SurgeryRefused and changes nothing.
    """

    def __init__(self, moe: MoE, optimizer: Optimizer | None = None) -> None:
        self.moe = moe
        self.optimizer = optimizer

    def split(self, expert: int, direction: Tensor, offset: float) -> Surgery:
        """Grow: the expert becomes two equal halves under a new hyperplane, so the function does not change.

        Args:
            direction: (D,) normal u of the hyperplane; tokens with u.x + offset > 0 go to the new half.
            offset: minus the median of u.x over the expert's tokens halves them.
        """
        e = self._index(expert)
        width = self.moe.w_in.shape[1]
        if direction.shape != (width,) or not bool(direction.isfinite().all()) or not math.isfinite(offset):
            raise SurgeryRefused(
                f"split of expert {expert}: the direction must be {width} finite numbers, and the offset finite"
            )
        surgery = self._grow("split", e, family=None)
        with torch.no_grad():
            self.moe.node_weight[-1] = direction
            self.moe.node_offset[-1] = offset
        self.moe.path[e, -1], self.moe.path[-1, -1] = -1, 1
        self.moe.refresh()
        return surgery

    def clone(self, expert: int) -> Surgery:
        """Ablation, ordinary upcycling: a copy in a family of its own, under a copy of its router row."""
        e = self._index(expert)
        surgery = self._grow("clone", e, family=int(self.moe.family_of[e]))
        self.moe.refresh()
        return surgery

    def reinit(self, generator: torch.Generator | None = None) -> Surgery:
        """Ablation, naive growth: a new expert with random weights in a family with a random router row."""
        surgery = self._grow("reinit", FRESH, family=FRESH)
        width, hidden = self.moe.w_in.shape[1:]
        with torch.no_grad():
            for rows, fan_in in (
                (self.moe.w_in[-1], width),
                (self.moe.w_out[-1], hidden),
                (self.moe.router[:, -1], width),
            ):
                rows.copy_(uniform(tuple(rows.shape), fan_in, generator))
        self.moe.refresh()
        return surgery

    def remove(self, expert: int) -> Surgery:
        """Prune: the sibling subtree takes the parent node's place; an only member takes its family with it."""
        e = self._index(expert)
        moe, n = self.moe, self.moe.n_routed
        family, path = int(moe.family_of[e]), moe.path
        on_path = path[e].nonzero().flatten().tolist()
        if not on_path and moe.n_families <= moe.top_k:
            raise SurgeryRefused(
                f"remove of expert {expert}: {moe.n_families} families are left and top_k is {moe.top_k}"
            )
        families = list(range(moe.n_families))
        sources = {"expert": [i for i in range(n) if i != e]}
        if on_path:  # the parent is the node on the path with the fewest leaves below it
            parent = min(on_path, key=lambda node: int((path[:, node] != 0).sum()))
            sources["node"] = [i for i in range(path.shape[1]) if i != parent]
        else:
            families.remove(family)
            sources["family"] = families
        rebuild(moe, self.optimizer, sources)
        if not on_path:
            moe.family_of[moe.family_of > family] -= 1
        moe.refresh()
        return Surgery("remove", expert, None, tuple(families), n, moe.n_routed)

    def _grow(self, operation: str, e: int, family: int | None) -> Surgery:
        """Append a copy of expert index e (FRESH: a blank one); `family` is the family to copy, None to share e's."""
        moe, n = self.moe, self.moe.n_routed
        families = list(range(moe.n_families))
        parent = None if e == FRESH else int(moe.expert_id[e])
        sources = {"expert": [*range(n), e]}
        if family is None:
            sources["node"] = [*range(moe.path.shape[1]), FRESH]
        else:
            families.append(family)
            sources["family"] = families
        rebuild(moe, self.optimizer, sources)
        if family is not None:
            moe.family_of[-1] = moe.n_families - 1
            moe.path[-1] = 0
            families[-1] = FRESH
        moe.expert_id[-1] = moe.next_id
        moe.next_id += 1
        return Surgery(operation, int(moe.expert_id[-1]), parent, tuple(families), n, moe.n_routed)

    def _index(self, expert: int) -> int:
        found = (self.moe.expert_id == expert).nonzero().flatten().tolist()
        if not found:
            raise SurgeryRefused(f"expert {expert} does not exist; the layer has {self.moe.expert_id.tolist()}")
        return int(found[0])


def halving_plane(
    tokens: Tensor, direction: Literal["principal", "random"], generator: torch.Generator
) -> tuple[Tensor, float]:
    """A hyperplane (unit normal, offset) that halves tokens (M, D): the median along a direction.

    Args:
        direction: "principal" is the tokens' first principal component, "random" uniform on the sphere.
    """
    width = tokens.shape[1]
    if direction == "principal" and len(tokens) > 1:
        centred = (tokens - tokens.mean(0)).double()
        normal = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1].to(tokens.dtype)
        normal = normal * normal[normal.abs().argmax()].sign()  # an eigenvector's sign is arbitrary
    else:
        normal = F.normalize(torch.randn(width, generator=generator), dim=0).to(tokens)
    return normal, -float((tokens @ normal).quantile(0.5)) if len(tokens) else 0.0


def copy_gates(moe: MoE, optimizer: Optimizer | None, n_gates: int) -> None:
    """Give the layer `n_gates` routers, each a copy of its first one (per-task gates over shared experts)."""
    rebuild(moe, optimizer, {"gate": [0] * n_gates})
