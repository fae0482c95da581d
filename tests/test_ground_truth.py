"""Controllers that go by the change of the loss do only what is allowed and gains for certain, at its price."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from phasegate.base.errors import UserError
from phasegate.signals import ground_truth
from phasegate.signals.features import CHANGES, FEATURES, Change
from phasegate.signals.forks import Estimate, estimate
from phasegate.signals.predictor import SIZES, CounterfactualHead, save_head
from phasegate.surgery.controllers import Action, Allowed, Controller, Policy, Proposal, Situation
from tests.models import draws, seeds

E, SIZE = 5, 100  # experts, and parameters of one
Masks = list[tuple[bool, bool]]  # may grow, may be pruned
ALL = [(True, True)] * E
GROW, PRUNE = Action.GROW, Action.PRUNE
masks = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=E, max_size=E)
prices = st.sampled_from([0.0, 0.001, 0.01, 0.05])  # nats per parameter


def build(policy: Policy, seed: int = 0) -> Controller:
    unasked: Any = None
    course: Any = SimpleNamespace(seed=seed, gate=SimpleNamespace(x=torch.zeros(1)))
    return policy.build(unasked, unasked, course)


def situation(allowed: Masks, load: Tensor | None = None) -> Situation:
    layer = SimpleNamespace(weights=lambda e: torch.zeros(SIZE))
    probe: Any = SimpleNamespace(layer=layer, signals=SimpleNamespace(load=load))
    unasked = mock.Mock(side_effect=AssertionError)
    return Situation(probe, Allowed(*torch.tensor(allowed).T), torch.Generator(), 4, torch.zeros(E), unasked)


def best(gains: dict[Proposal, float]) -> Proposal | None:
    """The greatest gain, if it is one."""
    proposal = max(gains, key=lambda proposal: gains[proposal], default=None)
    return proposal if proposal is not None and gains[proposal] > 0 else None


@given(seeds, masks, prices)
def test_the_head_does_the_most_certain_gain_that_is_allowed(seed: int, allowed: Masks, price: float) -> None:
    random, gains = draws(seed), {}
    change, error = torch.randn(E, len(CHANGES), generator=random), 0.5 * torch.rand(E, len(CHANGES), generator=random)
    for e, may in enumerate(allowed):
        for action, column, cost in ((GROW, Change.GROW, price), (PRUNE, Change.RECOVERED, -price)):
            if may[action]:
                gains[Proposal(action, e)] = float(-change[e, column] - 2 * error[e, column]) - cost * SIZE
    features = torch.randn(E, len(FEATURES))
    head = SimpleNamespace(predict=lambda x: Estimate(change, error) if x is features else None)
    given: Any = {"load_head": lambda *asked: head, "situation_features": lambda *asked: features}
    with mock.patch.multiple(ground_truth, **given):
        controller = build(ground_truth.PredictedPolicy(Path("heads"), price))
        assert controller.propose(situation(allowed)) == best(gains)


class Bench:
    """Forks and removals with given results, that remember what they were asked."""

    def __init__(self, seed: int) -> None:
        random = draws(seed)
        self.load = torch.rand(E, generator=random)
        self.immediate = Estimate(0.3 * torch.randn(E, generator=random), 0.1 * torch.rand(E, generator=random))
        self.immediate.change[seed % E] = torch.inf  # an expert that can't go
        mean = 0.3 * torch.randn(2, 2, E, 1, 1, generator=random) - 0.1  # split, action, expert
        self.changes = (mean + 0.1 * torch.randn(2, 2, E, 3, 20, generator=random)).double()
        self.asked: list[Proposal] = []
        self.lengths: list[tuple[object, ...]] = []  # steps and repeats

    def forks(self, proposals: Sequence[Proposal], *situation: object) -> tuple[Tensor, Tensor]:
        self.asked += proposals
        self.lengths.append(situation[-2:])
        signal, gate = (torch.stack([split[proposal] for proposal in proposals]) for split in self.changes)
        return signal, gate

    def gain(self, split: int, proposal: Proposal, price: float) -> float:
        change, error = map(float, estimate(self.changes[split][proposal]))
        return -change - 2 * error + (price if proposal.action == PRUNE else -price) * SIZE

    def propose(self, price: float, candidates: int = E, allowed: Masks = ALL) -> Proposal | None:
        controller = build(ground_truth.MeasuredPolicy(price, candidates, steps=7, repeats=3))
        assert not list(controller.parameters())
        with mock.patch.multiple(ground_truth, removals=lambda probe: self.immediate, fork_proposals=self.forks):
            return controller.propose(situation(allowed, self.load))


@settings(max_examples=60)
@given(seeds, masks, prices, st.integers(1, E))
@example(0, [(False, False)] * E, 0.0, E)
def test_the_best_is_done_if_both_splits_say_so(seed: int, allowed: Masks, price: float, candidates: int) -> None:
    bench = Bench(seed)
    found = bench.propose(price, candidates, allowed)
    growable = [e for e in range(E) if allowed[e][GROW]]
    change, error = bench.immediate.change.tolist(), bench.immediate.error.tolist()
    prunable = [e for e in range(E) if allowed[e][PRUNE] and change[e] - 2 * error[e] <= price * SIZE]
    busiest = sorted(growable, key=lambda e: float(bench.load[e]), reverse=True)[:candidates]
    cheapest = sorted(prunable, key=lambda e: change[e])[:candidates]
    expected = [*(Proposal(GROW, e) for e in busiest), *(Proposal(PRUNE, e) for e in cheapest)]
    assert sorted(bench.asked) == sorted(expected) and bench.lengths == ([(7, 3)] if expected else [])
    choice = best({proposal: bench.gain(0, proposal, price) for proposal in expected})
    assert found == (choice if choice is not None and bench.gain(1, choice, price) > 0 else None)


@pytest.mark.parametrize("action", [GROW, PRUNE])
@pytest.mark.parametrize("gaining", [(0, 1), (0,), (1,), ()])
def test_a_gain_that_only_one_split_shows_is_none(action: Action, gaining: tuple[int, ...]) -> None:
    bench = Bench(0)
    bench.immediate, bench.changes[:] = Estimate(torch.zeros(E), torch.zeros(E)), 0.5
    bench.changes[gaining, action, 3] = -0.5
    assert bench.propose(0.001) == ((action, 3) if len(gaining) == 2 else None)


def test_a_predicted_policy_reads_the_head_of_its_seed(tmp_path: Path) -> None:
    f, c = len(FEATURES), len(CHANGES)
    for seed, gaining in ((0, Change.GROW), (1, Change.RECOVERED)):
        log_sizes, weights = torch.full((c, len(SIZES)), -3.0), torch.ones(c, 1)
        log_sizes[:, 0], weights[gaining] = 0, -1
        scales = (torch.zeros(f), torch.ones(f), torch.ones(c), torch.zeros(1, f))
        save_head(CounterfactualHead(*scales, log_sizes, torch.ones(c, 1, 1), weights), tmp_path / f"seed-{seed}")
    policy, shown = ground_truth.PredictedPolicy(tmp_path, price=1e-8), situation(ALL)
    with mock.patch.object(ground_truth, "situation_features", lambda situation, course: torch.zeros(E, f)):
        assert [build(policy, seed).propose(shown) for seed in (0, 1)] == [(GROW, 0), (PRUNE, 0)]
    with pytest.raises(UserError, match=r"seed-2.* is missing"):
        build(policy, 2)
