"""Grow and prune the experts of a MoE layer in the middle of training, together with its optimizer.

`moments.py` says what becomes of the optimizer's moments.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from phasegate.model.moe import MoE, uniform
from phasegate.surgery.moments import FRESH, expert_tensors, prime_hyperplane, rebuild, scale_moments

Moments = Literal["scaled", "carried"]


class SurgeryRefused(ValueError):
    """Refuse an operation that would break the layer; nothing was changed."""


@dataclass(frozen=True)
class Surgery:
    """Record what was done to one layer."""

    operation: str
    expert: int  # stable id of the expert that came (grow) or went (prune)
    parent: int | None  # stable id of the expert that it was made from or merged into, if any
    family_source: tuple[int, ...]  # for each family now, its index before; FRESH if it is new
    n_routed_before: int
    n_routed_after: int


class ExpertManager:
    """Operate on one layer and the optimizer that trains it. Experts are named by stable id.

    Each operation returns what it did, or raises SurgeryRefused and changes nothing. Adam's moments of copies and
    halves are scaled by their share of the tokens, or carried as they are.
    """

    def __init__(self, moe: MoE, optimizer: Optimizer | None = None, moments: Moments = "scaled") -> None:
        self.moe, self.optimizer, self.moments = moe, optimizer, moments

    def split(self, expert: int, direction: Tensor, offset: float, share: float = 0.5) -> Surgery:
        """Grow: turn the expert into two equal halves under a new hyperplane, so that the function does not change.

        Tokens x with `direction` (D,) . x + `offset` > 0 go to the new half: a `share` of the expert's tokens.
        """
        e = self._index(expert)
        width = self.moe.w_in.shape[1]
        if direction.shape != (width,) or not bool(direction.isfinite().all()) or not math.isfinite(offset):
            raise SurgeryRefused(
                f"split of expert {expert}: the direction must be {width} finite numbers, and the offset finite"
            )
        if not 0 < share < 1:
            raise SurgeryRefused(f"split of expert {expert}: the share is {share}: it must lie between 0 and 1")
        surgery = self._grow("split", e, family=None)
        self._scale("expert", {e: 1 - share, -1: share})
        with torch.no_grad():
            self.moe.node_weight[-1] = direction
            self.moe.node_offset[-1] = offset
        prime_hyperplane(self.moe, self.optimizer, int(self.moe.family_of[e]))
        return surgery

    def clone(self, expert: int, share: float = 0.5) -> Surgery:
        """Grow by ordinary upcycling: copy the expert and its router row, so that the copy displaces other experts.

        Each of the two then gets a `share` of the expert's tokens; more than half if it displaces others.
        """
        e = self._index(expert)
        if not 0 < share <= 1:
            raise SurgeryRefused(f"clone of expert {expert}: the share is {share}: it must be above 0, at most 1")
        family = int(self.moe.family_of[e])
        surgery = self._grow("clone", e, family)
        self._scale("expert", {e: share, -1: share})
        self._scale("family", {family: share, -1: share})
        return surgery

    def reinit(self, generator: torch.Generator | None = None) -> Surgery:
        """Grow naively: add an expert with random weights, in a family with a random router row of the usual norm."""
        surgery = self._grow("reinit", FRESH, family=FRESH)
        moe = self.moe
        width, hidden = moe.w_in.shape[1:]
        with torch.no_grad():
            for rows, fan_in in ((moe.w_in[-1], width), (moe.w_out[-1], hidden), (moe.router[:, -1], width)):
                rows.copy_(uniform(tuple(rows.shape), fan_in, generator))
            norms = moe.router.norm(dim=-1)  # (G, F): a small row among trained ones would get few tokens
            moe.router[:, -1] *= (norms[:, :-1].mean(1) / norms[:, -1]).unsqueeze(1)
        return surgery

    def remove(self, expert: int) -> Surgery:
        """Prune: the sibling subtree takes the parent node's place; an only member takes its family with it.

        Tokens that did not run it keep their experts and, unless top_k is 1 and a family goes, their output.
        """
        e = self._index(expert)
        moe, n = self.moe, self.moe.n_routed
        family, node, families = int(moe.family_of[e]), self._parent_node(e), list(range(self.moe.n_families))
        if node is None and moe.n_families <= moe.top_k:
            raise SurgeryRefused(
                f"remove of expert {expert}: {moe.n_families} families are left and top_k is {moe.top_k}"
            )
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
        """Prune: two sibling leaves become their weighted mean, and their node goes.

        The sibling `into` keeps its id; `share` is the weight of `expert`: its share of the tokens that the two run.
        The gradients add up: the first moments too, and the second become those of a sum of two that agree, or more.
        """
        a, b = self._index(expert), self._index(into)
        if self.sibling(expert) != into:
            raise SurgeryRefused(f"merge of expert {expert} into {into}: they are not the two leaves under one node")
        if not 0 <= share <= 1:
            raise SurgeryRefused(f"merge of expert {expert} into {into}: the share is {share}: it must lie in 0 to 1")
        load = self.moe.load[a]
        weights, moments = expert_tensors(self.moe, self.optimizer)
        merged = [rows[b].lerp(rows[a], share) for rows in weights]  # exactly equal where the two are
        merged += [rows[b].lerp(rows[a], 0.5) for rows in moments]
        surgery = self.remove(expert)
        b = self._index(into)
        weights, moments = expert_tensors(self.moe, self.optimizer)
        for rows, mean in zip(weights + moments, merged, strict=True):
            rows[b] = mean
        scale_moments(self.moe, self.optimizer, "expert", {b: 2})
        self.moe.load[b] += load
        return replace(surgery, operation="merge", parent=into)

    def sibling(self, expert: int) -> int | None:
        """Return the other leaf under the expert's node, if there is a node and its other side is a leaf."""
        node = self._parent_node(self._index(expert))
        if node is None:
            return None
        below = self.moe.expert_id[self.moe.path[:, node] != 0].tolist()
        return next(int(other) for other in below if other != expert) if len(below) == 2 else None

    def _parent_node(self, e: int) -> int | None:
        """Find the node right above expert index e: the node on its path with the fewest leaves below."""
        on_path = self.moe.path[e].nonzero().flatten().tolist()
        return min(on_path, key=lambda node: int((self.moe.path[:, node] != 0).sum()), default=None)

    def _grow(self, operation: str, e: int, family: int | None) -> Surgery:
        """Append a copy of expert index e (FRESH: a blank one); `family` is the family to copy, None to share e's."""
        moe, n = self.moe, self.moe.n_routed
        families = list(range(moe.n_families))
        parent = None if e == FRESH else int(moe.expert_id[e])
        sources = {"expert": [*range(n), e]}
        if family is None:
            sources["node"] = [*range(moe.path.shape[1]), FRESH]
        else:
            sources["family"] = [*families, family]
            families.append(FRESH)
        rebuild(moe, self.optimizer, sources)
        if family is None:
            moe.path[e, -1], moe.path[-1, -1] = -1, 1
        else:
            moe.family_of[-1], moe.path[-1] = moe.n_families - 1, 0
        moe.expert_id[-1] = moe.next_id
        moe.next_id += 1
        moe.refresh()
        return Surgery(operation, int(moe.expert_id[-1]), parent, tuple(families), n, moe.n_routed)

    def _scale(self, axis: str, shares: dict[int, float]) -> None:
        if self.moments == "scaled":
            scale_moments(self.moe, self.optimizer, axis, shares)

    def _index(self, expert: int) -> int:
        found = (self.moe.expert_id == expert).nonzero().flatten().tolist()
        if not found:
            raise SurgeryRefused(f"expert {expert} does not exist; the layer has {self.moe.expert_id.tolist()}")
        return int(found[0])
