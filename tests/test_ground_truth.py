"""Controllers that go by the change of the loss do only what is allowed and gains for certain, at its price."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phasegate.control import Allowed, Controller, Proposal, Situation
from phasegate.counterfactual import Estimate, Forked, estimate
from phasegate.counterfactual_head import CHANGES, FEATURES, GROW, RECOVERED, CounterfactualHead, save_head
from phasegate.errors import UserError
from phasegate.ground_truth import MeasuredControl, MeasuringController, PredictedControl, PredictingController
from phasegate.probe import Probe
from phasegate.signals import ExpertSignals

E, SIZE = 5, 100  # experts, and parameters of one
NO_PROBE = cast(Probe, None)  # nobody asks
seeds = st.integers(0, 10**6)
masks = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=E, max_size=E)
prices = st.sampled_from([0.0, 0.001, 0.01, 0.05])  # nats per parameter
ALL = [(True, True)] * E


def unasked(*questions: object) -> NoReturn:
    raise AssertionError("nobody needs to know")


def situation(
    allowed: list[tuple[bool, bool]],
    load: Tensor | None = None,
    features: Callable[[], Tensor] = unasked,
    removals: Callable[[], Estimate] = unasked,
    forks: Callable[[list[Proposal], int, int], Forked] = unasked,
) -> Situation:
    ones = torch.ones(E) / E if load is None else load
    signals = ExpertSignals(ones, ones, ones, torch.zeros(E, 4), torch.tensor(0.5))
    return Situation(
        signals=signals,
        allowed=Allowed(*torch.tensor(allowed).T),
        loss_after=unasked,
        draws=torch.Generator(),
        features=features,
        removals=removals,
        forks=forks,
        expert_size=SIZE,
        probe=NO_PROBE,
    )


class Oracle(CounterfactualHead):
    """A head that predicts what it is told, of the features that it is told."""

    def __init__(self, change: Tensor, error: Tensor) -> None:
        super().__init__(1)
        self.told, self.of = Estimate(change, error), torch.randn(E, len(FEATURES))

    def predict(self, features: Tensor) -> Estimate:
        assert features is self.of
        return self.told


def proposed(change: Tensor, error: Tensor, price: float, allowed: list[tuple[bool, bool]] = ALL) -> Proposal | None:
    """What a controller does whose head predicts these changes (E, C) and errors; one that may not act does nothing."""
    head = Oracle(change, error)
    shown = situation(allowed, features=lambda: head.of)
    assert PredictingController(head, price, acts=False).propose(shown) is None
    return PredictingController(head, price, acts=True).propose(shown)


def best(gains: dict[Proposal, float]) -> Proposal | None:
    """The greatest gain, if it is one."""
    proposal = max(gains, key=lambda proposal: gains[proposal], default=None)
    return proposal if proposal is not None and gains[proposal] > 0 else None


@given(seeds, masks, prices)
def test_the_head_does_the_most_certain_gain_of_all_that_is_allowed(
    seed: int, allowed: list[tuple[bool, bool]], price: float
) -> None:
    draws = torch.Generator().manual_seed(seed)
    change = torch.randn(E, len(CHANGES), generator=draws)
    error = 0.5 * torch.rand(E, len(CHANGES), generator=draws)
    gains = {}
    for e, (may_grow, may_prune) in enumerate(allowed):
        if may_grow:
            gains[Proposal("grow", e)] = float(-change[e, GROW] - 2 * error[e, GROW]) - price * SIZE
        if may_prune:
            gains[Proposal("prune", e)] = float(-change[e, RECOVERED] - 2 * error[e, RECOVERED]) + price * SIZE
    assert proposed(change, error, price, allowed) == best(gains)


@pytest.mark.parametrize("action, column, sign", [("grow", GROW, -1), ("prune", RECOVERED, 1)])
def test_growth_pays_the_price_and_pruning_earns_it(action: str, column: int, sign: int) -> None:
    for gain, error in ((0.3, 0.1), (-0.3, 0.1), (0.3, 0.2), (0.0, 0.0)):
        certain = gain - 2 * error
        change, errors = torch.ones(E, len(CHANGES)), torch.zeros(E, len(CHANGES))
        change[2, column], errors[2, column] = -gain, error
        for price in (0.0, 0.0005, 0.002, 0.006):  # so that pruning a harmless expert pays only if there is a price
            expected = (action, 2) if certain + sign * price * SIZE > 1e-6 else None
            assert proposed(change, errors, price) == expected


class Bench:
    """Forks and removals with given results, that remember what they were asked."""

    def __init__(self, seed: int, noise: float = 0.1) -> None:
        draws = torch.Generator().manual_seed(seed)
        self.load = torch.rand(E, generator=draws)
        self.at_once = Estimate(0.3 * torch.randn(E, generator=draws), 0.1 * torch.rand(E, generator=draws))
        mean = 0.3 * torch.randn(2, 2, E, 1, 1, generator=draws) - 0.1  # split, action, expert
        self.changes = (mean + noise * torch.randn(2, 2, E, 3, 20, generator=draws)).double()
        self.asked: list[Proposal] = []
        self.lengths: list[tuple[int, int]] = []

    def forks(self, proposals: list[Proposal], steps: int, repeats: int) -> Forked:
        self.asked += proposals
        self.lengths.append((steps, repeats))
        of = [(int(proposal.action == "prune"), proposal.expert) for proposal in proposals]
        return Forked(*(torch.stack([self.changes[split][place] for place in of]) for split in (0, 1)))

    def gain(self, split: int, proposal: Proposal, price: float) -> float:
        prunes = proposal.action == "prune"
        change, error = map(float, estimate(self.changes[split, int(prunes), proposal.expert]))
        return -change - 2 * error + (price if prunes else -price) * SIZE

    def propose(
        self,
        price: float,
        candidates: int = E,
        allowed: list[tuple[bool, bool]] = ALL,
        control: Controller | None = None,
    ) -> Proposal | None:
        shown = situation(allowed, self.load, removals=lambda: self.at_once, forks=self.forks)
        return (control or MeasuringController(price, candidates, steps=7, repeats=3)).propose(shown)


@settings(max_examples=60)
@given(seeds, masks, prices, st.integers(1, E))
def test_the_most_promising_are_measured_and_the_best_is_done_if_both_splits_say_so(
    seed: int, allowed: list[tuple[bool, bool]], price: float, candidates: int
) -> None:
    bench = Bench(seed)
    found = bench.propose(price, candidates, allowed)
    growable = [e for e in range(E) if allowed[e][0]]
    change, error = bench.at_once.change.tolist(), bench.at_once.error.tolist()
    prunable = [e for e in range(E) if allowed[e][1] and change[e] - 2 * error[e] <= price * SIZE]
    busiest = sorted(growable, key=lambda e: float(bench.load[e]), reverse=True)[:candidates]
    cheapest = sorted(prunable, key=lambda e: change[e])[:candidates]
    expected = [*(Proposal("grow", e) for e in busiest), *(Proposal("prune", e) for e in cheapest)]
    assert sorted(bench.asked) == sorted(expected) and bench.lengths == ([(7, 3)] if expected else [])
    choice = best({proposal: bench.gain(0, proposal, price) for proposal in expected})
    assert found == (choice if choice is not None and bench.gain(1, choice, price) > 0 else None)


@pytest.mark.parametrize("action", [0, 1])
@pytest.mark.parametrize("signal, gate", [(True, True), (True, False), (False, True), (False, False)])
def test_a_gain_that_only_one_split_shows_is_none(action: int, signal: bool, gate: bool) -> None:
    bench = Bench(0)
    bench.changes[:] = 0.5
    bench.at_once = Estimate(torch.zeros(E), torch.zeros(E))
    for split, gains in enumerate((signal, gate)):
        bench.changes[split, action, 3] = -0.5 if gains else 0.5
    expected = ("prune" if action else "grow", 3) if signal and gate else None
    assert bench.propose(0.001) == expected


def test_what_can_not_go_or_for_certain_costs_more_than_it_earns_is_not_measured() -> None:
    bench = Bench(0)
    change = torch.tensor([float("inf"), 0.5, 0.5, 0.0, 0.2])
    bench.at_once = Estimate(change, torch.tensor([0.0, 0.1, 0.3, 0.0, 0.0]))
    bench.propose(0.001)  # 0.1 nats per expert
    assert [proposal.expert for proposal in bench.asked if proposal.action == "prune"] == [3, 2]


def test_where_nothing_may_be_done_nothing_is_measured() -> None:
    assert Bench(0).propose(0.0, allowed=[(False, False)] * E) is None


def test_a_measured_control_is_built_as_described() -> None:
    bench = Bench(1)
    control = MeasuredControl(price=0.01, candidates=2, steps=9, repeats=4).build(16, 0, torch.device("cpu"))
    bench.propose(0.01, control=control)
    assert bench.lengths == [(9, 4)] and sum(proposal.action == "grow" for proposal in bench.asked) == 2
    assert control.parameters() == []


def test_a_predicted_control_reads_the_head_of_its_seed(tmp_path: Path) -> None:
    for seed in (0, 1):
        head = CounterfactualHead(1)
        for ones in (head.scale, head.unit, head.factor):
            ones.fill_(1)
        head.log_sizes.fill_(-3)
        head.log_sizes[:, 0] = 0
        head.weights.fill_(1.0)
        head.weights[RECOVERED if seed else GROW] = -1.0  # what gains: pruning for one seed, growing for the other
        (tmp_path / f"seed-{seed}").mkdir()
        save_head(head, tmp_path / f"seed-{seed}")
    shown = situation(ALL, features=lambda: torch.zeros(E, len(FEATURES)))
    control, cpu = PredictedControl(tmp_path, price=1e-8), torch.device("cpu")
    assert [control.build(16, seed, cpu).propose(shown) for seed in (0, 1)] == [("grow", 0), ("prune", 0)]
    assert PredictedControl(tmp_path, 1e-8, acts=False).build(16, 0, cpu).propose(shown) is None
    with pytest.raises(UserError, match=r"seed-2.* is missing"):
        control.build(16, 2, cpu)
