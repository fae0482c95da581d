"""When to change the architecture, and what: controllers turn signals into proposals.

A controller adds a term to the training loss (its head may learn from every batch) and now and then proposes one
operation. *How* an operation is done is the expert manager's business, *whether* it may be done the caller's:
it passes masks of the experts that may grow and that may be pruned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phasegate.params import EntropyLabels, RandomLabels
from phasegate.signals import N_SCALARS, ExpertSignals, features

GROW, PRUNE, KEEP = range(3)


class Proposal(NamedTuple):
    """One operation on one expert, by its index."""

    action: Literal["grow", "prune"]
    expert: int


class Allowed(NamedTuple):
    """Which experts may be grown and which pruned, (E,) each."""

    grow: Tensor
    prune: Tensor


Acts = Literal["sample", "argmax", "never"]
Labeller = Callable[[ExpertSignals, torch.Generator], Tensor]
"""Signals -> one label (GROW, PRUNE or KEEP) per expert, (E,)."""


def random_labels(grow: float, prune: float) -> Labeller:
    """Labels that carry no information: drawn anew for every expert and batch."""
    probabilities = torch.tensor([grow, prune, 1 - grow - prune]).clamp(min=0)

    def label(signals: ExpertSignals, generator: torch.Generator) -> Tensor:
        return torch.multinomial(probabilities, len(signals.load), True, generator=generator)

    return label


def entropy_labels(grow_below: float, prune_above: float) -> Labeller:
    """Labels from routing entropy, which says how replaceable an expert is.

    Where the router hesitates (entropy above `prune_above` times the batch's), another expert would do: prune.
    Where it does not (below `grow_below` times), nobody shares the expert's work: grow. Without tokens: prune.
    """

    def label(signals: ExpertSignals, generator: torch.Generator) -> Tensor:
        ratio = signals.entropy.detach() / signals.batch_entropy.detach().clamp(min=1e-12)
        labels = torch.full_like(ratio, KEEP, dtype=torch.int64)
        labels[ratio < grow_below] = GROW
        labels[(ratio > prune_above) | (signals.load == 0)] = PRUNE
        return labels

    return label


class ControlHead(nn.Module):
    """Expert features (E, D + 3) -> logits over grow, prune, keep (E, 3)."""

    def __init__(self, n_features: int, hidden: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_features, hidden), nn.ReLU(), nn.Linear(hidden, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(E, D + 3) -> (E, 3)."""
        logits: Tensor = self.layers(x)
        return logits


@dataclass(frozen=True)
class Control:
    """How an arm is controlled, as plain values.

    Args:
        labels: the parameters of the labels, and so their kind.
        head: a head learns the labels and decides; without it the labels decide.
        acts: whether decisions are carried out.
        detach: whether the head's gradient is kept out of the trunk.
    """

    labels: RandomLabels | EntropyLabels
    head: bool
    acts: bool
    detach: bool = True

    def build(self, width: int, device: torch.device) -> "Controller":
        """The controller of one layer, for tokens of this width."""
        if isinstance(self.labels, RandomLabels):
            labeller = random_labels(self.labels.grow, self.labels.prune)
            weight, sample = self.labels.loss_weight, True
        else:
            labeller = entropy_labels(self.labels.grow_below, self.labels.prune_above)
            weight, sample = 1.0, False
        if not self.head:
            return LabelController(labeller) if self.acts else Controller()
        acts: Acts = ("sample" if sample else "argmax") if self.acts else "never"
        head = ControlHead(width + N_SCALARS).to(device)
        return HeadController(labeller, head, weight, self.detach, acts)


class Controller:
    """The controller that leaves everything as it is; the others refine its two methods."""

    def loss(self, signals: ExpertSignals, generator: torch.Generator) -> Tensor | float:
        """A term for the training loss, from the batch's signals."""
        return 0.0

    def propose(self, signals: ExpertSignals, allowed: Allowed, generator: torch.Generator) -> Proposal | None:
        """One operation, or none, from the signal split's statistics."""
        return None

    def parameters(self) -> list[nn.Parameter]:
        """What the controller learns itself."""
        return []


class LabelController(Controller):
    """Acts on labels directly: each expert is labelled, and one of those to change is drawn."""

    def __init__(self, labeller: Labeller) -> None:
        self.labeller = labeller

    def propose(self, signals: ExpertSignals, allowed: Allowed, generator: torch.Generator) -> Proposal | None:
        """One labelled expert, drawn with equal chances among those that may be changed so."""
        one_hot = F.one_hot(self.labeller(signals, generator).cpu(), 3)
        return draw(one_hot, allowed, generator)


class HeadController(Controller):
    """A head learns labels from expert features, and decides.

    Args:
        labeller: where the labels come from.
        weight: of the head's loss; its gradient reaches the trunk unless `detach`.
        acts: "sample" draws decisions from the head's probabilities (of noise labels the argmax is always keep),
            "argmax" takes the surest decision, "never" leaves the architecture alone.
    """

    def __init__(
        self,
        labeller: Labeller,
        head: ControlHead,
        weight: float = 1.0,
        detach: bool = True,
        acts: Acts = "never",
    ) -> None:
        self.labeller, self.head, self.weight, self.detach, self.acts = labeller, head, weight, detach, acts

    def loss(self, signals: ExpertSignals, generator: torch.Generator) -> Tensor:
        """Weighted cross-entropy of the head on this batch's labels, nats."""
        x = features(signals)
        labels = self.labeller(signals, generator).to(x.device)
        return self.weight * F.cross_entropy(self.head(x.detach() if self.detach else x), labels)

    def propose(self, signals: ExpertSignals, allowed: Allowed, generator: torch.Generator) -> Proposal | None:
        """The head's decision on the signal split."""
        if self.acts == "never":
            return None
        probs = self.head(features(signals)).softmax(-1).cpu()
        if self.acts == "argmax":
            decided = F.one_hot(probs.argmax(-1), 3) * probs
            return surest(decided, allowed)
        decisions = torch.multinomial(probs, 1, generator=generator).squeeze(1)
        return draw(F.one_hot(decisions, 3), allowed, generator)

    def parameters(self) -> list[nn.Parameter]:
        """The head's."""
        return list(self.head.parameters())


def possible(decided: Tensor, allowed: Allowed) -> Tensor:
    """Weights (E, 2) of growing and pruning each expert, zero where it is not allowed."""
    return decided[:, :KEEP].double() * torch.stack([allowed.grow, allowed.prune], dim=1)


def draw(decided: Tensor, allowed: Allowed, generator: torch.Generator) -> Proposal | None:
    """One of the decided operations (E, 3), with chances in proportion to their weights."""
    weights = possible(decided, allowed).flatten()
    if weights.sum() == 0:
        return None
    return _proposal(int(torch.multinomial(weights, 1, generator=generator)))


def surest(decided: Tensor, allowed: Allowed) -> Proposal | None:
    """The decided operation of the greatest weight."""
    weights = possible(decided, allowed).flatten()
    return _proposal(int(weights.argmax())) if weights.max() > 0 else None


def _proposal(flat: int) -> Proposal:
    expert, action = divmod(flat, KEEP)
    return Proposal("grow" if action == GROW else "prune", expert)
