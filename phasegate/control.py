"""When to change the architecture, and what: controllers turn signals into proposals.

A controller adds a term to the training loss (its head may learn from every batch) and now and then proposes one
operation. *How* an operation is done is the expert manager's business, *whether* it may be done the caller's:
it passes masks of the experts that may grow and that may be pruned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phasegate.counterfactual import Estimate, Forked
from phasegate.phase_params import EntropyLabels, RandomLabels, UsageLabels
from phasegate.probe import Probe
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


class Situation(NamedTuple):
    """What a controller may look at and ask when it decides. Asking changes nothing."""

    signals: ExpertSignals  # of the signal split
    allowed: Allowed
    loss_after: Callable[[Proposal], float]  # mean signal loss (nats) right after an operation, done on a copy
    draws: torch.Generator
    features: Callable[[], Tensor]  # (E, F) of `counterfactual_head.FEATURES`, on the gate split
    removals: Callable[[], Estimate]  # (E,) change of the signal loss (nats) as each expert goes; inf if it can't
    forks: Callable[[list[Proposal], int, int], Forked]  # measured changes by each, after so many steps, repeated
    expert_size: int  # parameters of one expert
    probe: Probe  # the layer on the signal split


Acts = Literal["sample", "argmax", "never"]
Labeller = Callable[[ExpertSignals, torch.Generator], Tensor]
"""Signals -> one label (GROW, PRUNE or KEEP) per expert, (E,)."""


def random_labels(grow: float, prune: float) -> Labeller:
    """Labels that carry no information: drawn anew for every expert and batch."""
    probabilities = torch.tensor([grow, prune, 1 - grow - prune]).clamp(min=0)

    def label(signals: ExpertSignals, draws: torch.Generator) -> Tensor:
        return torch.multinomial(probabilities, len(signals.load), True, generator=draws)

    return label


def usage_labels(grow_above: float, prune_below: float) -> Labeller:
    """Labels from load: grow an expert above `grow_above` times the even share, prune one below `prune_below`."""

    def label(signals: ExpertSignals, draws: torch.Generator) -> Tensor:
        share = signals.load * len(signals.load)
        labels = torch.full_like(share, KEEP, dtype=torch.int64)
        labels[share > grow_above] = GROW
        labels[share < prune_below] = PRUNE
        return labels

    return label


def entropy_labels(grow_below: float, prune_above: float) -> Labeller:
    """Labels from routing entropy, which says how replaceable an expert is.

    Where the router hesitates (entropy above `prune_above` times the batch's), another expert would do: prune.
    Where it does not (below `grow_below` times), nobody shares the expert's work: grow. Without tokens: prune.
    """

    def label(signals: ExpertSignals, draws: torch.Generator) -> Tensor:
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


class Controller:
    """A controller of one layer, that leaves everything as it is; the others refine its methods."""

    def loss(self, signals: ExpertSignals, draws: torch.Generator) -> Tensor | float:
        """A term for the training loss, from the batch's signals."""
        return 0.0

    def propose(self, situation: Situation) -> Proposal | None:
        """One operation, or none."""
        return None

    def parameters(self) -> list[nn.Parameter]:
        """What the controller learns itself."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What changes as training goes on: tensors, and what JSON can hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""


class LabelController(Controller):
    """Acts on labels directly: each expert is labelled, and one of those to change is drawn."""

    def __init__(self, labeller: Labeller) -> None:
        self.labeller = labeller

    def propose(self, situation: Situation) -> Proposal | None:
        """One labelled expert, drawn with equal chances among those that may be changed so."""
        labels = self.labeller(situation.signals, situation.draws)
        return draw(F.one_hot(labels.cpu(), 3), situation.allowed, situation.draws)


class HeadController(Controller):
    """A head learns labels from expert features, and decides.

    Args:
        labeller: where the labels come from.
        weight: of the head's loss; its gradient reaches the trunk unless `detach`.
        acts: "sample" draws decisions from the head's probabilities (of noise labels the argmax is always keep),
            "argmax" takes the surest decision, "never" leaves the architecture alone.
    """

    def __init__(self, labeller: Labeller, head: ControlHead, weight: float, detach: bool, acts: Acts) -> None:
        self.labeller, self.head, self.weight, self.detach, self.acts = labeller, head, weight, detach, acts

    def loss(self, signals: ExpertSignals, draws: torch.Generator) -> Tensor:
        """Weighted cross-entropy of the head on this batch's labels, nats."""
        x = features(signals)
        labels = self.labeller(signals, draws).to(x.device)
        return self.weight * F.cross_entropy(self.head(x.detach() if self.detach else x), labels)

    def propose(self, situation: Situation) -> Proposal | None:
        """The head's decision."""
        if self.acts == "never":
            return None
        probs = self.head(features(situation.signals)).softmax(-1).cpu()
        if self.acts == "argmax":
            decided = F.one_hot(probs.argmax(-1), 3) * probs
            return surest(decided, situation.allowed)
        decisions = torch.multinomial(probs, 1, generator=situation.draws).squeeze(1)
        return draw(F.one_hot(decisions, 3), situation.allowed, situation.draws)

    def parameters(self) -> list[nn.Parameter]:
        """The head's."""
        return list(self.head.parameters())

    def state_dict(self) -> dict[str, Any]:
        """The head's."""
        return self.head.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with such a head."""
        self.head.load_state_dict(state)


class PlannedController(Controller):
    """Grows the busiest expert so many times, then prunes the least used, or that without which the loss is lowest."""

    def __init__(self, plan: "Plan") -> None:
        self.plan, self._done = plan, 0

    def propose(self, situation: Situation) -> Proposal | None:
        """The next operation of the plan; where none is allowed, the plan waits."""
        if self._done == self.plan.grow + self.plan.prune:
            return None
        grows = self._done < self.plan.grow
        candidates = situation.allowed.grow if grows else situation.allowed.prune
        experts = candidates.nonzero().flatten().tolist()
        if not experts:
            return None
        self._done += 1
        load = situation.signals.load
        if grows:
            return Proposal("grow", max(experts, key=lambda e: float(load[e])))
        if self.plan.prune_by == "usage":
            return Proposal("prune", min(experts, key=lambda e: float(load[e])))
        return Proposal("prune", min(experts, key=lambda e: situation.loss_after(Proposal("prune", e))))

    def state_dict(self) -> dict[str, Any]:
        """How much of the plan is done."""
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the rest of the plan."""
        self._done = state["done"]


class Control(Protocol):
    """How an arm is controlled, as plain values."""

    def build(self, width: int, seed: int, device: torch.device) -> Controller:
        """The controller of one layer, for tokens of this width, in the trial of a seed."""

    def files(self, seed: int) -> tuple[Path, ...]:
        """What it reads in the trial of a seed."""
        return ()


@dataclass(frozen=True)
class LabelControl(Control):
    """Labels decide."""

    labels: RandomLabels | EntropyLabels | UsageLabels

    def build(self, width: int, seed: int, device: torch.device) -> Controller:
        """The controller of one layer, for tokens of this width."""
        return LabelController(labeller(self.labels))


@dataclass(frozen=True)
class HeadControl(Control):
    """A head learns labels and decides; see `HeadController` for `acts` and `detach`."""

    labels: RandomLabels | EntropyLabels
    acts: Acts
    detach: bool = True

    def build(self, width: int, seed: int, device: torch.device) -> Controller:
        """The controller of one layer, for tokens of this width."""
        weight = self.labels.loss_weight if isinstance(self.labels, RandomLabels) else 1.0
        head = ControlHead(width + N_SCALARS).to(device)
        return HeadController(labeller(self.labels), head, weight, self.detach, self.acts)


@dataclass(frozen=True)
class Plan(Control):
    """So many operations, written beforehand: what surgery does can be measured apart from what calls for it."""

    grow: int
    prune: int = 0
    prune_by: Literal["usage", "loss"] = "usage"

    def build(self, width: int, seed: int, device: torch.device) -> Controller:
        """The controller of one layer."""
        return PlannedController(self)


def labeller(labels: RandomLabels | EntropyLabels | UsageLabels) -> Labeller:
    """The labels that these parameters describe."""
    match labels:
        case RandomLabels():
            return random_labels(labels.grow, labels.prune)
        case EntropyLabels():
            return entropy_labels(labels.grow_below, labels.prune_above)
        case UsageLabels():
            return usage_labels(labels.grow_above, labels.prune_below)


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
