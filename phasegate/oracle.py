"""Ground truth for pruning: what a model loses without some of a layer's experts, measured and not predicted.

The exhaustive oracle knows the loss of *every* set of experts. A token's output depends on a set through the K
experts that it chooses from it alone, and there are few ways to choose K of E: one table of losses per token and
choice, and every set is a sum of look-ups.

Shapes: N examples, D model width, E experts, K chosen, P ways to choose K of E.
"""

import copy
from functools import lru_cache
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from phasegate.expert_manager import ExpertManager, SurgeryRefused
from phasegate.model import Model
from phasegate.training import Examples, predict

MOST_EXPERTS = 16  # of the exhaustive oracle: it holds one loss per set of experts
ROWS = 1 << 16  # passed through the rest of the model at a time
LOOK_UPS = 1 << 20  # sets times tokens at a time


@torch.no_grad()
def example_losses(model: Model, examples: Examples) -> Tensor:
    """The loss of every example on the first task (N,), nats."""
    logits = torch.cat([output.logits[0] for output in predict(model, examples.x)])
    return F.cross_entropy(logits, examples.y, reduction="none")


@torch.no_grad()
def losses_without_each(model: Model, block: int, examples: Examples) -> Tensor:
    """The loss of every example after each expert's removal (E, N), nats; infinite where it can't be removed."""
    whole, layer = model.blocks[block], model.layers[block]
    losses = torch.full((layer.n_routed, len(examples)), float("inf"), dtype=examples.x.dtype, device=examples.x.device)
    try:
        for e, expert in enumerate(layer.expert_id.tolist()):
            whole.moe = copy.deepcopy(layer)
            try:
                ExpertManager(whole.moe).remove(expert)
            except SurgeryRefused:
                continue
            losses[e] = example_losses(model, examples)
    finally:
        whole.moe = layer
    return losses


@torch.no_grad()
def losses_of_all_sets(model: Model, block: int, examples: Examples) -> Tensor:
    """The mean loss (nats) with every set of a layer's experts: (2**E,), bit e of the index set if e is alive.

    Infinite where fewer than K are alive.

    Raises:
        ValueError: for a layer with siblings, more than MOST_EXPERTS experts, or several tokens per example.
    """
    moe = model.layers[block]
    if moe.path.shape[1] or moe.n_routed > MOST_EXPERTS:
        raise ValueError(f"the oracle tries all sets of at most {MOST_EXPERTS} experts without siblings")
    choosing = _Choosing(model, block, examples)
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
    """For every set of n ranks (2**n,): the number of the choice of its k best among `combinations(range(n), k)`.

    comb(n, k) where a set has fewer than k.
    """
    number = {choice: index for index, choice in enumerate(combinations(range(n), k))}
    best = (tuple(rank for rank in range(n) if ranks >> rank & 1)[:k] for ranks in range(1 << n))
    return torch.tensor([number.get(choice, len(number)) for choice in best])


class _Choosing:
    """A layer whose experts have all been run on all tokens, so that any choice among them is a weighted sum."""

    def __init__(self, model: Model, block: int, examples: Examples) -> None:
        self.model, self.block, self.y = model.eval(), block, examples.y
        moe, inputs = model.layers[block], []
        hook = model.blocks[block].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        with hook:
            outputs = predict(model, examples.x)
        self.stream = torch.cat([rows[0] for rows in inputs])  # (N, D) what the block is given
        if len(self.stream) != len(examples):
            raise ValueError("the oracle needs one token per example")
        tokens = torch.cat([output.routings[block].tokens[0] for output in outputs])  # (N, D)
        probs = torch.cat([output.routings[block].probs[0] for output in outputs])  # (N, E): each its own family
        scores = torch.cat([output.routings[block].logits[0] for output in outputs]) + moe.selection_bias[0]
        order = scores.argsort(descending=True, stable=True)  # (N, E) families by rank
        family = moe.family_of.argsort()  # the only expert of each family
        self.rank = order.argsort()[:, moe.family_of]  # (N, E) of each expert with each token
        self.probs = probs.gather(1, order)  # (N, E) by rank
        by_expert = torch.stack([moe.run(e, tokens) for e in family.tolist()], dim=1)
        self.outputs = by_expert.gather(1, order[:, :, None].expand_as(by_expert))  # (N, E, D) by rank
        if moe.n_shared:
            self.stream = self.stream + (tokens @ moe.shared_in).relu() @ moe.shared_out

    def losses(self) -> Tensor:
        """Loss of each token under each choice of K ranks, and infinity last: (N, P + 1)."""
        n, moe = len(self.y), self.model.layers[self.block]
        choices = torch.tensor(list(combinations(range(moe.n_routed), moe.top_k)), device=self.y.device)
        parts = []
        for some in torch.split(choices, max(1, ROWS // n)):  # (p, K)
            gates = self.probs[:, some]  # (N, p, K)
            gates = gates / gates.sum(-1, keepdim=True)
            mixed = torch.stack([gates[:, :, k, None] * self.outputs[:, some[:, k]] for k in range(moe.top_k)]).sum(0)
            parts.append(self._rest(mixed, torch.arange(n, device=self.y.device)))
        return torch.cat([*parts, parts[0].new_full((n, 1), float("inf"))], dim=1)

    def losses_alone(self, some: Tensor, sets: Tensor) -> Tensor:
        """For K = 1, where the gate depends on all that are alive: losses of tokens (n,) under sets of ranks (n, S)."""
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
        for block in self.model.blocks[self.block + 1 :]:
            h, _ = block(h)
        logits = self.model.heads[0](self.model.norm(h[0]))
        targets = self.y[some][:, None].expand(mixed.shape[:2]).flatten()
        return F.cross_entropy(logits, targets, reduction="none").view(mixed.shape[:2])
