"""Define the mixture-of-experts layer: two-level routing over stacked expert tensors.

Every expert belongs to a *family*. The router scores families and picks the top K, which is ordinary top-K softmax
routing while every family has one member. Inside a family the experts are the leaves of a binary tree of hyperplanes.
A token runs the one leaf that it reaches by descending the tree. So a family may grow without any change of the
router, and each token always runs K experts.

Shapes: N tokens, D model width, H expert width, E experts, F families, K chosen families, L inner nodes,
G gates (routers over the same experts; one, except under multi-task training).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from phasegate.model import births, experts
from phasegate.model.births import Birth
from phasegate.model.kernels.functions import product
from phasegate.params.phases import BIRTH_STEPS

AXES: dict[str, tuple[str | None, ...]] = {
    "w_in": ("expert", None, None),
    "w_out": ("expert", None, None),
    "expert_id": ("expert",),
    "family_of": ("expert",),
    "load": ("expert",),
    "path": ("expert", "node"),
    "router": ("gate", "family", None),
    "selection_bias": ("gate", "family"),
    "node_weight": ("node", None),
    "node_offset": ("node",),
}
"""The meaning of each axis of each tensor of the layer. Surgery reads it, so that no tensor is forgotten."""


class Routing(NamedTuple):
    """Hold how one forward pass routed its tokens. Most fields hold the graph: do not keep them."""

    tokens: Tensor  # (G, N, D) the input of the layer
    logits: Tensor  # (G, N, F) router scores
    families: Tensor  # (G, N, K) chosen families
    gates: Tensor  # (G, N, K) mixture weights; for K > 1 they sum to one
    experts: Tensor  # (G, N, K) the expert that each chosen family runs

    @property
    def probs(self) -> Tensor:
        """Compute the softmax of the scores (G, N, F), which the layer itself does not need."""
        return self.logits.softmax(-1)


class MoE(nn.Module):
    """Route tokens to experts.

    A new layer has `n_routed` experts of hidden width `expert_width`, each a family of its own, and `n_gates` routers
    over them (MMoE, KDD 2018). Each token runs `top_k` families, and all `n_shared` shared experts (DeepSeekMoE, arXiv
    2401.06066). ValueError if `top_k` is not between 1 and `n_routed`.
    """

    expert_id: Tensor  # (E,) stable ids
    next_id: Tensor  # () the id of the next new expert: no id is used twice
    family_of: Tensor  # (E,)
    load: Tensor  # (E,) tokens run in training since the last reset; a new expert inherits its parent's load
    path: Tensor  # (E, L) the side (+1, -1) of each node that leads to the expert; 0 for a node off its path
    selection_bias: Tensor  # (G, F) added to the scores for selection only (DeepSeek-V3, arXiv 2412.19437)
    birth: Tensor  # (3,) families before a birth that is under way, else 0; steps since; whether the old ones retire
    _root: Tensor
    _child: Tensor

    def __init__(
        self, width: int, n_routed: int, expert_width: int, top_k: int, n_shared: int = 0, n_gates: int = 1
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= n_routed:
            raise ValueError(f"top_k is {top_k}: it must lie between 1 and n_routed = {n_routed}")
        self.top_k, self.n_shared = top_k, n_shared
        self.w_in = nn.Parameter(uniform((n_routed, width, expert_width), fan_in=width))
        self.w_out = nn.Parameter(uniform((n_routed, expert_width, width), fan_in=expert_width))
        self.router = nn.Parameter(uniform((n_gates, n_routed, width), fan_in=width))
        self.node_weight = nn.Parameter(torch.empty(0, width))
        self.node_offset = nn.Parameter(torch.empty(0))
        if n_shared:
            self.shared_in = nn.Parameter(uniform((width, n_shared * expert_width), fan_in=width))
            self.shared_out = nn.Parameter(uniform((n_shared * expert_width, width), fan_in=expert_width))
        self.register_buffer("expert_id", torch.tensor(range(n_routed)))  # arange imports sympy on the meta device
        self.register_buffer("next_id", torch.tensor(n_routed))
        self.register_buffer("family_of", torch.tensor(range(n_routed)))
        self.register_buffer("load", torch.zeros(n_routed, dtype=torch.int64))
        self.register_buffer("path", torch.zeros(n_routed, 0, dtype=torch.int8))
        self.register_buffer("selection_bias", torch.zeros(n_gates, n_routed))
        self.register_buffer("birth", torch.zeros(3, dtype=torch.int64))
        self.under_way: Birth | None = None
        self.register_buffer("_root", torch.empty(0), persistent=False)
        self.register_buffer("_child", torch.empty(0), persistent=False)
        self.refresh()

    @property
    def n_routed(self) -> int:
        """Return E, read from the weights."""
        return self.w_in.shape[0]

    @property
    def n_families(self) -> int:
        """Return F, read from the router."""
        return self.router.shape[1]

    @property
    def slots(self) -> int:
        """Return how many experts each token runs."""
        return 2 * self.top_k if self.under_way and not self.under_way.retires else self.top_k

    @property
    def multiplied(self) -> int:
        """Count the multiply-adds of one token of one gate."""
        n_old, _, retires = self.under_way or (0, 0, True)
        scored = self.n_families if retires else self.n_families + n_old  # the old router scores, too
        nodes = self.node_weight.numel() * (2 if self.under_way else 1)
        shared = 2 * self.shared_in.numel() if self.n_shared else 0
        return scored * self.router.shape[-1] + nodes + self.slots * self.weights(0).numel() + shared

    def set_birth(self, birth: Birth | None) -> None:
        """Note that a birth is under way, or none; ValueError if the layer cannot be in it."""
        if birth and not (
            self.top_k <= birth.n_old < self.n_families
            and 0 <= birth.age < BIRTH_STEPS
            and birth.retires in (0, 1)
            and (not birth.retires or self.top_k <= self.n_families - birth.n_old)
        ):
            raise ValueError(f"{birth} does not fit a layer of {self.n_families} families with top_k = {self.top_k}")
        self.under_way = birth
        self.birth = self.birth.new_tensor(birth or (0, 0, 0), dtype=torch.int64)

    def resize_like(self, state: Mapping[str, Tensor]) -> None:
        """Resize every tensor that surgery resizes to its size in a stored state, without memory for its values.

        Each axis takes its size from the first stored tensor that has it.
        """
        sizes: dict[str, int] = {}
        for name, axes in AXES.items():
            if name in state and state[name].dim() == len(axes):
                sizes = {axis: size for axis, size in zip(axes, state[name].shape, strict=True) if axis} | sizes
        for name, axes in AXES.items():
            old = getattr(self, name)
            shape = [sizes.get(axis, size) if axis else size for axis, size in zip(axes, old.shape, strict=True)]
            new = torch.empty(shape, dtype=old.dtype, device="meta")
            setattr(self, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)

    def refresh(self) -> None:
        """Derive the tables of the descent from `family_of` and `path`, and the birth. Call it when those change.

        A slot is an inner node (0..L-1) or an expert (L + e). `_root` (F,) is the first slot of a family, `_child`
        (L + E, 2) the next slot of a token on the negative and on the positive side. Experts lead to themselves.
        Trees are joined from below, in time that is linear in the size of `path`; ValueError if they are none.
        """
        if self.path.is_meta:  # a checkpoint's model before its weights are there
            return
        columns, family_of, (n_experts, n_nodes) = self.path.T.cpu().numpy(), self.family_of.tolist(), self.path.shape
        top = torch.arange(n_nodes, n_nodes + n_experts).numpy()  # the slot of the tree that an expert is in so far
        child, sizes = [[slot, slot] for slot in range(n_nodes + n_experts)], [0] * n_nodes + [1] * n_experts
        for node in (columns != 0).sum(1).argsort().tolist():
            sides = [{*top[columns[node] == side].tolist()} for side in (-1, 1)]
            child[node], sizes[node] = [slot for side in sides for slot in side], int((columns[node] != 0).sum())
            if [len(side) for side in sides] != [1, 1] or sum(sizes[slot] for slot in child[node]) != sizes[node]:
                raise ValueError(f"path: node {node} does not join two trees of experts")
            top[columns[node] != 0] = node
        pairs = {*zip(family_of, top.tolist(), strict=True)}
        trees = dict(pairs)
        if [*sorted(trees)] != [*range(self.n_families)] or not len(pairs) == len(trees) == len({*trees.values()}):
            raise ValueError("family_of: a family is not the experts of one tree")
        device = self.path.device
        self._root = torch.tensor([trees[family] for family in range(self.n_families)], device=device)
        self._child = torch.tensor(child, device=device)
        self.set_birth(Birth(*self.birth.tolist()) if self.birth.any() else None)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if not arguments[-1]:  # else torch reports what did not fit
            self.refresh()

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Route tokens x (G, N, D), gate g's tokens by router g, and return the mixture (G, N, D).

        Selection compares scores, not probabilities. So it does not depend on the other families.
        """
        n_gates = x.shape[0]
        router, bias = cast(Tensor, self.router), self.selection_bias
        if n_gates < router.shape[0]:
            router, bias = router[:n_gates], bias[:n_gates]
        hyperplanes = (self.node_weight, self.node_offset, self._root, self._child)
        if self.under_way:
            how = (self.top_k, self.under_way, self.family_of)
            routed, weights, chosen = births.overlap(x, router, bias, hyperplanes, *how)
        else:
            routed = experts.route(x, router, bias, hyperplanes, self.top_k)
            weights, chosen = routed.weights, routed.experts
        y, counts = experts.mix(x, weights, chosen, self.w_in, self.w_out)
        if self.training:
            self.load += counts
        if self.n_shared:
            y = y + product(product(x, self.shared_in).relu(), self.shared_out)
        return y, Routing(x, routed.logits, routed.families, routed.gates, routed.experts)

    def margins(self, x: Tensor) -> Tensor:
        """Return the signed margins of tokens x (G, N, D) at every inner node (G, N, L)."""
        return product(x, self.node_weight.T, self.node_offset)

    def weights(self, e: int) -> Tensor:
        """Return all weights of expert index e, (2 * D * H,)."""
        return torch.cat([self.w_in[e].flatten(), self.w_out[e].flatten()])

    def run(self, e: int, x: Tensor) -> Tensor:
        """Return the ungated output of expert index e for tokens x (M, D) -> (M, D)."""
        return product(product(x, self.w_in[e]).relu(), self.w_out[e])

    def outputs(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return the ungated outputs of the chosen experts: x (G, N, D), chosen (G, N, K) -> (G, N, K, D)."""
        outputs = experts.run(x.flatten(0, 1), chosen.flatten(0, 1), self.w_in, self.w_out)
        return outputs.view(*chosen.shape, x.shape[-1])


def routing_entropy(probs: Tensor) -> Tensor:
    """Return the entropy of routing distributions (..., F), divided by log F: from 0 to 1 -> (...).

    A probability of zero adds nothing and gets no gradient: the logarithm's would be infinite.
    """
    families = probs.shape[-1]
    if families == 1:
        return probs.new_zeros(probs.shape[:-1])
    entropy: Tensor = torch.special.entr(probs.masked_fill(probs == 0, 1)).sum(-1)
    return entropy / math.log(families)


def relative_distance(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of the mean; zero for tensors of zeros."""
    return float((one - other).norm() / ((one + other) / 2).norm().clamp(min=torch.finfo(one.dtype).tiny))


def uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw a weight: uniform with variance 1 / fan_in (LeCun)."""
    bound = math.sqrt(3 / fan_in)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
