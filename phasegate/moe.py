"""The mixture-of-experts layer: two-level routing over stacked expert tensors.

Every expert belongs to a *family*. The router scores families and picks the top K, which is ordinary
top-K softmax routing while every family has one member. Inside a family the experts are the leaves of a
binary tree of hyperplanes, and a token runs the one leaf that descending the tree reaches. So a family may
grow without touching the router, and active compute stays K experts per token.

Shapes: N tokens, D model width, H expert width, E experts, F families, K chosen families, L inner nodes,
G gates (routers over the same experts; one, except under multi-task training).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phasegate import experts

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
"""What each axis of each tensor of the layer counts; surgery reads it, so that no tensor is forgotten."""


class Routing(NamedTuple):
    """How one forward pass routed its tokens. Most fields hold the graph: use them and let go."""

    tokens: Tensor  # (G, N, D) what the layer was given
    logits: Tensor  # (G, N, F) router scores
    families: Tensor  # (G, N, K) chosen families
    gates: Tensor  # (G, N, K) mixture weights; for K > 1 they sum to one
    experts: Tensor  # (G, N, K) the expert that each chosen family runs

    @property
    def probs(self) -> Tensor:
        """Softmax of the scores (G, N, F), computed anew at each use: the layer itself does not need it."""
        return self.logits.softmax(-1)


class MoE(nn.Module):
    """A routed feed-forward layer, optionally beside shared experts that run on every token.

    Args:
        width: D, the width of tokens.
        n_routed: E, the number of routed experts at birth, each a family of its own.
        expert_width: H, the hidden width of an expert.
        top_k: K, the number of families that each token runs.
        n_shared: number of shared experts (DeepSeekMoE, arXiv 2401.06066).
        n_gates: G, the number of routers over the same experts (MMoE, KDD 2018).

    Raises:
        ValueError: if top_k is not between 1 and n_routed.
    """

    expert_id: Tensor  # (E,) stable ids
    next_id: Tensor  # () the id that the next expert gets: ids are never used twice
    family_of: Tensor  # (E,)
    load: Tensor  # (E,) tokens run in training since it was last set to zero; a copy inherits its parent's
    path: Tensor  # (E, L) the side (+1, -1) of each node that leads to the expert; 0 where not on its path
    selection_bias: Tensor  # (G, F) added to the scores for selection only (DeepSeek-V3, arXiv 2412.19437)
    _root: Tensor
    _child: Tensor

    def __init__(
        self, width: int, n_routed: int, expert_width: int, top_k: int, n_shared: int = 0, n_gates: int = 1
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= n_routed:
            raise ValueError(f"top_k is {top_k}: it must lie between 1 and n_routed = {n_routed}")
        self.top_k = top_k
        self.w_in = nn.Parameter(uniform((n_routed, width, expert_width), fan_in=width))
        self.w_out = nn.Parameter(uniform((n_routed, expert_width, width), fan_in=expert_width))
        self.router = nn.Parameter(uniform((n_gates, n_routed, width), fan_in=width))
        self.node_weight = nn.Parameter(torch.empty(0, width))
        self.node_offset = nn.Parameter(torch.empty(0))
        if n_shared:
            self.shared_in = nn.Parameter(uniform((width, n_shared * expert_width), fan_in=width))
            self.shared_out = nn.Parameter(uniform((n_shared * expert_width, width), fan_in=expert_width))
        self.n_shared = n_shared
        self.register_buffer("expert_id", torch.arange(n_routed))
        self.register_buffer("next_id", torch.tensor(n_routed))
        self.register_buffer("family_of", torch.arange(n_routed))
        self.register_buffer("load", torch.zeros(n_routed, dtype=torch.int64))
        self.register_buffer("path", torch.zeros(n_routed, 0, dtype=torch.int8))
        self.register_buffer("selection_bias", torch.zeros(n_gates, n_routed))
        for derived in ("_root", "_child"):
            self.register_buffer(derived, torch.empty(0), persistent=False)
        self.refresh()

    @property
    def n_routed(self) -> int:
        """E, read from the weights, so that it can't be stale."""
        return self.w_in.shape[0]

    @property
    def n_families(self) -> int:
        """F, read from the router."""
        return self.router.shape[1]

    def refresh(self) -> None:
        """Derive the descent tables from `family_of` and `path`; to be called whenever those change.

        A slot is an inner node (0..L-1) or an expert (L + e). `_root` (F,) is where a family's descent starts,
        `_child` (L + E, 2) where a token on the negative / positive side goes on; experts lead to themselves.
        """
        if self.path.is_meta:  # a model without memory, as checkpoints are built before their weights are there
            return
        n_nodes, path, family_of = self.path.shape[1], self.path.tolist(), self.family_of.tolist()
        child = [[0, 0] for _ in range(n_nodes)] + [[n_nodes + e] * 2 for e in range(self.n_routed)]

        def descend(leaves: list[int]) -> tuple[int, int]:
            """The slot at which these leaves hang together, and the depth below it."""
            if len(leaves) == 1:
                return n_nodes + leaves[0], 0
            node = next(n for n in range(n_nodes) if {path[leaf][n] for leaf in leaves} == {-1, 1})
            sides = [[leaf for leaf in leaves if path[leaf][node] == side] for side in (-1, 1)]
            (child[node][0], left), (child[node][1], right) = descend(sides[0]), descend(sides[1])
            return node, 1 + max(left, right)

        roots = [descend([e for e, family in enumerate(family_of) if family == f]) for f in range(self.n_families)]
        device = self.path.device
        self._root = torch.tensor([slot for slot, _ in roots], device=device)
        self._child = torch.tensor(child, device=device)
        self._depth = max(depth for _, depth in roots)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Route tokens x (G, N, D), gate g's tokens by router g, and return the mixture (G, N, D).

        Selection compares scores, not probabilities: so it does not depend on which other families there are.
        """
        n_gates = x.shape[0]
        logits = x @ self.router[:n_gates].transpose(1, 2)  # (G, N, F)
        families = (logits.detach() + self.selection_bias[:n_gates, None]).topk(self.top_k).indices  # (G, N, K)
        gates = self._gates(logits, families)
        chosen, teaching = self._leaves(x, families)
        counts = experts.count(chosen, self.n_routed)
        if self.training:
            self.load += counts
        rows = experts.sort(chosen.flatten(0, 1), counts)
        weights = gates if teaching is None else gates * teaching
        y = experts.mixture(x.flatten(0, 1), weights.flatten(0, 1), self.w_in, self.w_out, rows).view_as(x)
        if self.n_shared:
            y = y + (x @ self.shared_in).relu() @ self.shared_out
        return y, Routing(x, logits, families, gates, chosen)

    def _gates(self, logits: Tensor, families: Tensor) -> Tensor:
        """Mixture weights of the chosen families (G, N, K): their probabilities; for K > 1, scaled to sum to one.

        A lone gate keeps its probability, else the router would get no gradient (Switch, arXiv 2101.03961).
        """
        if self.top_k == 1:
            return logits.softmax(-1).gather(-1, families)
        return logits.gather(-1, families).softmax(-1)

    def _leaves(self, x: Tensor, families: Tensor) -> tuple[Tensor, Tensor | None]:
        """The expert that each chosen family runs (G, N, K), and a factor of value one that teaches hyperplanes.

        The factor is r / stop_gradient(r) with r the product of sigmoid(signed margin) along the path.
        """
        n_nodes = self.path.shape[1]
        slots = self._root.take(families)
        if not n_nodes:
            return slots, None
        margins = self.margins(x)
        trained = self.node_weight.requires_grad
        log_r = torch.zeros_like(slots, dtype=x.dtype) if trained else None
        for _ in range(self._depth):
            margin = margins.gather(-1, slots.clamp(max=n_nodes - 1))
            if log_r is not None:
                log_r = log_r + torch.where(slots < n_nodes, F.logsigmoid(margin.abs()), 0)
            slots = self._child.take(2 * slots + (margin > 0))
        return slots - n_nodes, None if log_r is None else (log_r - log_r.detach()).exp()

    def margins(self, x: Tensor) -> Tensor:
        """Signed margins of tokens x (G, N, D) at every inner node (G, N, L)."""
        return x @ self.node_weight.T + self.node_offset

    def weights(self, e: int) -> Tensor:
        """All weights of expert index e, (2 * D * H,)."""
        return torch.cat([self.w_in[e].flatten(), self.w_out[e].flatten()])

    def run(self, e: int, x: Tensor) -> Tensor:
        """What expert index e makes of tokens x (M, D), ungated -> (M, D)."""
        return (x @ self.w_in[e]).relu() @ self.w_out[e]

    def outputs(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What the chosen experts make of each token, ungated: x (G, N, D), chosen (G, N, K) -> (G, N, K, D)."""
        rows = experts.sort(chosen.flatten(0, 1), experts.count(chosen, self.n_routed))
        return experts.outputs(x.flatten(0, 1), self.w_in, self.w_out, rows).view(*chosen.shape, -1)


def routing_entropy(probs: Tensor) -> Tensor:
    """Entropy of routing distributions (..., F), normalised by log F to 0..1 -> (...)."""
    families = probs.shape[-1]
    if families == 1:
        return probs.new_zeros(probs.shape[:-1])
    entropy: Tensor = torch.special.entr(probs).sum(-1)
    return entropy / math.log(families)


def relative_distance(one: Tensor, other: Tensor) -> float:
    """Norm of the difference, relative to that of the mean; zero for nothing."""
    return float((one - other).norm() / ((one + other) / 2).norm().clamp(min=torch.finfo(one.dtype).tiny))


def uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator | None = None) -> Tensor:
    """A fresh weight: uniform with variance 1 / fan_in (LeCun)."""
    bound = math.sqrt(3 / fan_in)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
