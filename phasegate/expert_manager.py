"""Surgery: grow and prune the experts of a MoE layer in the middle of training, together with the optimizer.

A surgery is one index vector per axis. New expert i is a copy of old expert `src[i]`, and the same gather runs
over *every* tensor that has that axis (`moe.AXES`) and over its Adam moments, so untouched experts stay bitwise
what they were. An index of -1 asks for a fresh row.

Fresh rows begin with zero momentum and with the second moment of their peers: of the other rows, and for a
hyperplane, which is a router row inside its family, of the row that routes to it. Zeroed second moments under a
large step count would make Adam's first update about 0.1 / sqrt(0.001) = 3.2 times the learning rate, and a step
count of their own would make it the learning rate itself, some four times what trained rows move.
"""

import math
from dataclasses import dataclass, replace

import torch
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
    parent: int | None  # stable id of the expert that it was made from or merged into, if any
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
        self._prime_hyperplane(int(self.moe.family_of[e]))
        self.moe.path[e, -1], self.moe.path[-1, -1] = -1, 1
        self.moe.refresh()
        return surgery

    def clone(self, expert: int) -> Surgery:
        """Ablation, ordinary upcycling: a copy under a router row of its own, also a copy, which displaces others."""
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
        """Prune: the sibling subtree takes the parent node's place; an only member takes its family with it.

        Tokens that did not run it keep their experts and, unless top_k is 1 and a family goes, their output.
        """
        e = self._index(expert)
        moe, n = self.moe, self.moe.n_routed
        family, node = int(moe.family_of[e]), self._parent_node(e)
        if node is None and moe.n_families <= moe.top_k:
            raise SurgeryRefused(
                f"remove of expert {expert}: {moe.n_families} families are left and top_k is {moe.top_k}"
            )
        families = list(range(moe.n_families))
        sources = {"expert": [i for i in range(n) if i != e]}
        if node is None:
            families.remove(family)
            sources["family"] = families
        else:
            sources["node"] = [i for i in range(moe.path.shape[1]) if i != node]
        rebuild(moe, self.optimizer, sources)
        if node is None:
            moe.family_of[moe.family_of > family] -= 1
        moe.refresh()
        return Surgery("remove", expert, None, tuple(families), n, moe.n_routed)

    def merge(self, expert: int, into: int, share: float) -> Surgery:
        """Prune: two sibling leaves become their weighted mean, moments included, and their node goes.

        Args:
            into: the sibling that becomes the mean, and keeps its id.
            share: of `expert` in the mean, 0 to 1: its share of the tokens that the two run.
        """
        a, b = self._index(expert), self._index(into)
        if self.sibling(expert) != into:
            raise SurgeryRefused(f"merge of expert {expert} into {into}: they are not the two leaves under one node")
        if not 0 <= share <= 1:
            raise SurgeryRefused(f"merge of expert {expert} into {into}: the share is {share}: it must lie in 0 to 1")
        load = self.moe.load[a]
        merged = [rows[b].lerp(rows[a], share) for rows in self._learned()]  # exactly equal where the two are
        surgery = self.remove(expert)
        b = self._index(into)
        for rows, mean in zip(self._learned(), merged, strict=True):
            rows[b] = mean
        self.moe.load[b] += load
        return replace(surgery, operation="merge", parent=into)

    def sibling(self, expert: int) -> int | None:
        """The other leaf under the expert's node, if there is a node and it is a leaf."""
        node = self._parent_node(self._index(expert))
        if node is None:
            return None
        below = self.moe.expert_id[self.moe.path[:, node] != 0].tolist()
        return next(int(other) for other in below if other != expert) if len(below) == 2 else None

    def _parent_node(self, e: int) -> int | None:
        """The node right above expert index e: of those on its path, the one with the fewest leaves below."""
        on_path = self.moe.path[e].nonzero().flatten().tolist()
        return min(on_path, key=lambda node: int((self.moe.path[:, node] != 0).sum()), default=None)

    def _learned(self) -> list[Tensor]:
        """Every learned tensor with a row per expert, and its moments."""
        found = []
        for name, axes in AXES.items():
            parameter = getattr(self.moe, name)
            if axes[0] == "expert" and isinstance(parameter, nn.Parameter):
                state = self.optimizer.state.get(parameter, {}) if self.optimizer else {}
                found += [parameter.detach(), *(value for value in state.values() if value.dim())]
        return found

    def _prime_hyperplane(self, family: int) -> None:
        """Give the last node the second moment of its family's router row, and no momentum."""
        if self.optimizer is None or not self.moe.node_weight.requires_grad:
            return
        row = self.optimizer.state.get(self.moe.router)
        if not row:
            return
        peers = row["exp_avg_sq"][:, family].mean(0)  # (D,)
        for parameter, second in ((self.moe.node_weight, peers), (self.moe.node_offset, peers.mean())):
            state = self.optimizer.state[parameter]
            if not state:  # the layer's first hyperplane
                blank = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                state |= {"step": row["step"].clone(), **blank}
            state["exp_avg_sq"][-1] = second

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


def copy_gates(moe: MoE, optimizer: Optimizer | None, n_gates: int) -> None:
    """Give the layer `n_gates` routers, each a copy of its first one (per-task gates over shared experts)."""
    rebuild(moe, optimizer, {"gate": [0] * n_gates})
