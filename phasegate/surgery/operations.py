"""Grow and prune the experts of a MoE layer in the middle of training, together with its optimizer.

`moments.py` says what becomes of the optimizer's moments.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from phasegate.model.births import Birth
from phasegate.model.moe import MoE, uniform
from phasegate.params.phases import BIRTH_STEPS
from phasegate.surgery.moments import FRESH, expert_tensors, prime_hyperplane, rebuild, scale_moments
from phasegate.training.randomness import generator

Moments = Literal["scaled", "carried"]
ROUTER_NOISE = 0.1  # of copied router rows, relative to their norm


class SurgeryRefused(ValueError):
    """Refuse an operation that would break the layer; nothing was changed."""


@dataclass(frozen=True)
class Surgery:
    """Record what was done to one layer."""

    operation: str
    expert: int  # stable id of the expert that came (grow; the first of several) or went (prune)
    parent: int | None  # stable id of the expert that it was made from or merged into, if any
    family_source: tuple[int, ...]  # for each family now, its index before; FRESH if it is new
    n_routed_before: int
    n_routed_after: int


class ExpertManager:
    """Operate on one layer and the optimizer that trains it. Experts are named by stable id.

    Each operation returns what it did, or raises SurgeryRefused and changes nothing, as it does while a birth is under
    way. Adam's moments of copies and halves are scaled by their share of the tokens, or carried as they are.
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
        surgery = self._grow("split", [e])
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
        surgery = self._grow("clone", [e], [family])
        self._scale("expert", {e: share, -1: share})
        self._scale("family", {family: share, -1: share})
        return surgery

    def reinit(self, generator: torch.Generator | None = None) -> Surgery:
        """Grow naively: add an expert with random weights, in a family with a random router row of the usual norm."""
        surgery = self._grow("reinit", [FRESH], [FRESH])
        moe = self.moe
        width, hidden = moe.w_in.shape[1:]
        with torch.no_grad():
            for rows, fan_in in ((moe.w_in[-1], width), (moe.w_out[-1], hidden), (moe.router[:, -1], width)):
                rows.copy_(uniform(tuple(rows.shape), fan_in, generator))
            norms = moe.router.norm(dim=-1)  # (G, F): a small row among trained ones would get few tokens
            moe.router[:, -1] *= (norms[:, :-1].mean(1) / norms[:, -1]).unsqueeze(1)
        return surgery

    def birth(self, count: int, retires: bool = False, generator: torch.Generator | None = None) -> Surgery:
        """Grow by newborns, `count` fresh experts with families of their own, without any change of the output.

        Their output weights and moments are zero, and the router hands over to them during the next
        `BIRTH_STEPS` steps, for which `grow_older` must be called. Then the old experts stay beside them, or
        all of them go if the old one `retires`.
        """
        moe, n_old = self.moe, self.moe.n_families
        if count < (least := moe.top_k if retires else 1):
            raise SurgeryRefused(f"birth of {count} experts: it must be at least {least}")
        surgery = self._grow("handover" if retires else "birth", [FRESH] * count, [FRESH] * count)
        width, inside = moe.w_in.shape[1:]
        with torch.no_grad():
            moe.w_in[-count:] = uniform((count, width, inside), width, generator)
            moe.router[:, -count:] = uniform((len(moe.router), count, width), width, generator)
        for axis in ("expert", "family"):
            scale_moments(moe, self.optimizer, axis, dict.fromkeys(range(-count, 0), 0.0))
        moe.set_birth(Birth(n_old, 0, retires))
        return surgery

    def upcycle(self, count: int, generator: torch.Generator | None = None) -> Surgery:
        """Grow by `count` copies of the experts in turn, each with a copy of its router row that is moved by noise.

        The noise (`ROUTER_NOISE`) decides between copies that would else tie (Sparse Upcycling, arXiv 2212.05055). The
        moments become those of an expert that shares its tokens with its copies.
        """
        if count < 1:
            raise SurgeryRefused(f"upcycle of {count} experts: it must be at least 1")
        moe, n = self.moe, self.moe.n_routed
        parents = [i % n for i in range(count)]
        families = moe.family_of[parents].tolist()
        surgery = self._grow("upcycle", parents, families)
        for axis, copied, first in (("expert", parents, n), ("family", families, moe.n_families - count)):
            shares = {row: 1 / (1 + copied.count(row)) for row in copied}
            self._scale(axis, shares | {first + i: shares[row] for i, row in enumerate(copied)})
        with torch.no_grad():
            rows = moe.router[:, -count:]
            noise = torch.randn(rows.shape, generator=generator).to(rows) / math.sqrt(rows.shape[-1])
            rows += ROUTER_NOISE * rows.norm(dim=-1, keepdim=True) * noise
        return surgery

    def remove(self, expert: int) -> Surgery:
        """Prune: the sibling subtree takes the parent node's place; an only member takes its family with it.

        Tokens that did not run it keep their experts and, unless top_k is 1 and a family goes, their output.
        """
        e = self._index(expert)
        self._refuse_during_birth("remove")
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
        The gradients add up: so do the first moments, and the second become those of a sum of two that agree. Where
        moments are carried as they are, each of the two has those of the whole, and their mean stays.
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
        self._scale("expert", {b: 2})
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

    def _grow(self, operation: str, parents: list[int], families: list[int] | None = None) -> Surgery:
        """Append copies of experts, by index (FRESH: blank ones).

        `families` are those to copy for them; without, a copy shares its parent's family.
        """
        moe, n, count = self.moe, self.moe.n_routed, len(parents)
        self._refuse_during_birth(operation)
        old = list(range(moe.n_families))
        parent = int(moe.expert_id[parents[0]]) if count == 1 and parents[0] != FRESH else None
        sources = {"expert": [*range(n), *parents]}
        if families is None:
            sources["node"] = [*range(moe.path.shape[1]), FRESH]
        else:
            sources["family"] = [*old, *families]
        rebuild(moe, self.optimizer, sources)
        if families is None:
            moe.path[parents[0], -1], moe.path[-1, -1] = -1, 1
        else:
            moe.family_of[-count:] = torch.arange(len(old), len(old) + count)
            moe.path[-count:] = 0
        moe.expert_id[-count:] = torch.arange(count) + moe.next_id.cpu()
        moe.next_id += count
        moe.refresh()
        source = (*old, *[FRESH] * (0 if families is None else count))
        return Surgery(operation, int(moe.expert_id[-count]), parent, source, n, moe.n_routed)

    def _refuse_during_birth(self, operation: str) -> None:
        if birth := self.moe.under_way:
            raise SurgeryRefused(
                f"{operation}: a birth is under way for {birth.age} steps, and takes {BIRTH_STEPS}: wait for its end"
            )

    def _scale(self, axis: str, shares: dict[int, float]) -> None:
        if self.moments == "scaled":
            scale_moments(self.moe, self.optimizer, axis, shares)

    def _index(self, expert: int) -> int:
        found = (self.moe.expert_id == expert).nonzero().flatten().tolist()
        if not found:
            raise SurgeryRefused(f"expert {expert} does not exist; the layer has {self.moe.expert_id.tolist()}")
        return int(found[0])


def kill(moe: MoE, optimizer: Optimizer | None, experts: list[int]) -> None:
    """Make experts, by index, dead: weights and moments are zero, and no gradient ever reaches them."""
    weights, moments = expert_tensors(moe, optimizer)
    for rows in weights + moments:
        rows[experts] = 0


def kill_some(layers: Iterable[MoE], optimizer: Optimizer | None, count: int, seed: int) -> None:
    """Kill `count` experts of each layer, drawn for the seed: the same ones whoever asks."""
    for block, moe in enumerate(layers):
        draws = generator(seed, "dead", block)
        kill(moe, optimizer, torch.randperm(moe.n_routed, generator=draws)[:count].tolist())


def grow_older(moe: MoE, optimizer: Optimizer | None) -> None:
    """Let a birth that is under way in a layer be one step of training older, and end it when it is over.

    Then the old experts go if they retire; else their moments become those of experts that share their tokens with the
    newborns.
    """
    if not (birth := moe.under_way):
        return
    age, old = birth.age + 1, (moe.family_of < birth.n_old).tolist()
    moe.set_birth(birth._replace(age=age) if age < BIRTH_STEPS else None)
    if moe.under_way:
        return
    if birth.retires:
        experts = [e for e, retires in enumerate(old) if not retires]
        rebuild(moe, optimizer, {"expert": experts, "family": [*range(birth.n_old, moe.n_families)], "node": []})
        moe.family_of -= birth.n_old
        moe.refresh()
    else:
        scale_moments(moe, optimizer, "expert", {e: sum(old) / len(old) for e, before in enumerate(old) if before})
