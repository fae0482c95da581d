"""Measure what a model loses without some of a layer's experts: the ground truth for pruning.

The exhaustive oracle knows the loss of *every* set of experts. A token's output depends on a set only through the K
experts that it chooses from the set, and there are few ways to choose K of E. So one table holds the loss of each token
under each choice, and the loss of a set is a sum of look-ups.

Shapes: N examples, S tokens per example, D model width, E experts, K chosen, P ways to choose K of E.
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from phasegate.model.kernels.functions import product
from phasegate.surgery.operations import ExpertManager, SurgeryRefused
from phasegate.surgery.probe import Probe

MOST_EXPERTS = 16  # of the exhaustive oracle: it holds one loss per set of experts
ROWS = 1 << 16  # passed through the rest of the model at a time
LOOK_UPS = 1 << 20  # sets times tokens at a time


@torch.no_grad()
def losses_without(probe: Probe, experts: Iterable[int], affected: Tensor | None = None) -> Tensor:
    """Measure the loss (nats) of each example (N,) once experts, by index, are removed in turn; inf if this is refused.

    Only the losses of the examples in the mask `affected` (N,) are computed anew, by default of all.
    """
    model, losses = probe.model.eval(), probe.losses.clone()
    rows = torch.ones_like(losses, dtype=torch.bool) if affected is None else affected
    stream = probe.stream.view(1, len(losses), probe.length, -1)[:, rows]  # (1, N', S, D)
    ids = probe.layer.expert_id[list(experts)].tolist()
    with model.spare_layer(probe.block) as spare:
        try:
            for expert in ids:
                ExpertManager(spare).remove(expert)
        except SurgeryRefused:
            return torch.full_like(losses, float("inf"))
        if rows.any():
            logits = model.onward(stream.flatten(1, 2), probe.length, start=probe.block).logits[0]
            losses[rows] = F.cross_entropy(logits, probe.examples.y[rows], reduction="none")
    return losses


def losses_without_each(probe: Probe) -> Tensor:
    """Measure the loss of every example without each expert (E, N), nats; infinite where the removal is refused.

    Only the examples that run the expert are computed anew: K passes in all, not E.
    """
    losses = []
    for e in range(probe.layer.n_routed):
        runs = (probe.routing.experts[0] == e).any(-1).view(-1, probe.length).any(-1)  # (N,)
        lone = probe.layer.top_k == 1  # a lone gate depends on all families that there are
        losses.append(losses_without(probe, [e], None if lone else runs))
    return torch.stack(losses)


def can_try_all_sets(probe: Probe) -> bool:
    """Tell whether the exhaustive oracle can try a layer: few experts without siblings, one token per example."""
    return probe.layer.n_routed <= MOST_EXPERTS and not probe.layer.path.shape[1] and probe.length == 1


@torch.no_grad()
def losses_of_all_sets(probe: Probe) -> Tensor:
    """Return the mean loss (nats) with every set of experts alive (2**E,), bit e for expert e; inf for fewer than K."""
    if not can_try_all_sets(probe):
        raise ValueError(f"the oracle needs at most {MOST_EXPERTS} experts without siblings, and one token per example")
    moe, examples, choosing = probe.layer, probe.examples, _Choosing(probe)
    table = choosing.losses() if moe.top_k > 1 else None
    choices = choice_of_set(moe.n_routed, moe.top_k).to(examples.y.device)
    total = torch.zeros(1 << moe.n_routed, dtype=torch.float64, device=examples.x.device)
    for some in torch.split(torch.arange(len(examples), device=examples.y.device), max(1, LOOK_UPS >> moe.n_routed)):
        sets = torch.zeros(len(some), 1, dtype=torch.int64, device=some.device)
        for e in range(moe.n_routed):  # every set again, its experts named by their rank with the token
            sets = torch.cat([sets, sets + (1 << choosing.rank[some, e : e + 1])], dim=1)
        losses = choosing.losses_alone(some, sets) if table is None else table[some].gather(1, choices[sets])
        total += losses.sum(0, dtype=torch.float64)
    return total / len(examples)


@lru_cache(maxsize=4)
def choice_of_set(n: int, k: int) -> Tensor:
    """Return where the k best of each set of n ranks (2**n,) stand in `combinations(range(n), k)`; past it if fewer."""
    number = {choice: index for index, choice in enumerate(combinations(range(n), k))}
    best = (tuple(rank for rank in range(n) if ranks >> rank & 1)[:k] for ranks in range(1 << n))
    return torch.tensor([number.get(choice, len(number)) for choice in best])


class _Choosing:
    """Run all experts of a layer on all tokens, so that any choice among them is a weighted sum."""

    def __init__(self, probe: Probe) -> None:
        self.probe, moe = probe, probe.layer
        tokens, probs = probe.routing.tokens[0], probe.routing.probs[0]  # (N, D), (N, E): each expert its own family
        order = (probe.routing.logits[0] + moe.selection_bias[0]).argsort(descending=True, stable=True)  # by rank
        family = moe.family_of.argsort()  # the only expert of each family
        self.rank = order.argsort()[:, moe.family_of]  # (N, E) of each expert with each token
        self.probs = probs.gather(1, order)  # (N, E) by rank
        by_expert = torch.stack([moe.run(e, tokens) for e in family.tolist()], dim=1)
        self.outputs = by_expert.gather(1, order[:, :, None].expand_as(by_expert))  # (N, E, D) by rank
        self.stream = probe.stream[0]  # (N, D)
        if moe.n_shared:
            self.stream = self.stream + product(product(tokens, moe.shared_in).relu(), moe.shared_out)

    def losses(self) -> Tensor:
        """Return the loss of each token under each choice of K ranks, and infinity last: (N, P + 1)."""
        n, moe, device = len(self.rank), self.probe.layer, self.rank.device
        choices = torch.tensor(list(combinations(range(moe.n_routed), moe.top_k)), device=device)
        parts = []
        for some in torch.split(choices, max(1, ROWS // n)):  # (p, K)
            gates = self.probs[:, some]  # (N, p, K)
            gates = gates / gates.sum(-1, keepdim=True)
            mixed = torch.stack([gates[:, :, k, None] * self.outputs[:, some[:, k]] for k in range(moe.top_k)]).sum(0)
            parts.append(self._rest(mixed, torch.arange(n, device=device)))
        return torch.cat([*parts, parts[0].new_full((n, 1), float("inf"))], dim=1)

    def losses_alone(self, some: Tensor, sets: Tensor) -> Tensor:
        """Return the losses of tokens (n,) under sets of ranks (n, S) for K = 1: a gate depends on the whole set."""
        alive = (sets[:, :, None] >> torch.arange(self.rank.shape[1], device=sets.device)) & 1  # (n, S, E)
        best = alive.argmax(-1)  # (n, S) the first that is alive
        probs = self.probs[some]
        gates = probs.gather(1, best) / (alive * probs[:, None]).sum(-1).clamp(min=torch.finfo(probs.dtype).tiny)
        rows = torch.arange(len(some), device=sets.device)[:, None]
        losses = self._rest(gates[:, :, None] * self.outputs[some][rows, best], some)
        return losses.masked_fill(sets == 0, float("inf"))

    def _rest(self, mixed: Tensor, some: Tensor) -> Tensor:
        """Pass mixtures (n, S, D) of tokens (n,) through the rest of the model -> losses (n, S)."""
        h = (self.stream[some][:, None] + mixed).flatten(0, 1)[None]
        logits = self.probe.model.onward(h, 1, start=self.probe.block + 1).logits[0]
        targets = self.probe.examples.y[some][:, None].expand(mixed.shape[:2]).flatten()
        return F.cross_entropy(logits, targets, reduction="none").view(mixed.shape[:2])
