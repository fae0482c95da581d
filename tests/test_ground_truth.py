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
from phasegate.signals.published import Scores
from phasegate.surgery.controllers import Action, Allowed, Controller, Policy, Proposal, Situation
from tests.models import draws, seeds

E, SIZE = 5, 100  # experts, and parameters of one
Z = 1.2815516  # standard errors that make a gain 90 % certain
Masks = list[tuple[bool, bool]]  # may grow, may be pruned
Plan = tuple[Proposal, ...]
ALL = [(True, True)] * E
GROW, PRUNE = Action.GROW, Action.PRUNE
masks = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=E, max_size=E)
prices = st.sampled_from([0.0, 0.001, 0.01, 0.05])  # nats per parameter


def build(policy: Policy, seed: int = 0) -> Controller:
    unasked: Any = None
    schedule = SimpleNamespace(act_every=4)
    course: Any = SimpleNamespace(seed=seed, gate=SimpleNamespace(x=torch.zeros(1)), schedule=schedule)
    return policy.build(unasked, unasked, course)


def situation(allowed: Masks, load: Tensor | None = None, step: int = 4, at_once: int = 1) -> Situation:
    layer = SimpleNamespace(weights=lambda e: torch.zeros(SIZE))
    probe: Any = SimpleNamespace(layer=layer, signals=SimpleNamespace(load=load))
    unasked = mock.Mock(side_effect=AssertionError)
    masks = torch.tensor(allowed).T
    return Situation(probe, Allowed(masks[0], masks[1], at_once), torch.Generator(), step, torch.zeros(E), unasked)


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
                gains[Proposal(action, e)] = float(-change[e, column] - Z * error[e, column]) - cost * SIZE
    features = torch.randn(E, len(FEATURES))
    head = SimpleNamespace(predict=lambda x: Estimate(change, error) if x is features else None)
    given: Any = {"load_head": lambda *asked: head, "situation_features": lambda *asked: features}
    with mock.patch.multiple(ground_truth, **given):
        controller = build(ground_truth.PredictedPolicy(Path("heads"), price, 0.9))
        assert controller.propose(situation(allowed)) == best(gains)


class Bench:
    """Forks and removals with given results, that remember what they were asked."""

    def __init__(self, seed: int) -> None:
        random = draws(seed)
        self.load = torch.rand(E, generator=random)
        self.saliency = torch.rand(E, generator=random).round(decimals=1)  # with ties
        mean = 0.3 * torch.randn(2, 2, E, 1, 1, generator=random) - 0.1  # split, action, expert
        self.changes = (mean + 0.1 * torch.randn(2, 2, E, 3, 20, generator=random)).double()
        self.asked: list[Plan] = []
        self.lengths: list[tuple[object, ...]] = []  # steps and repeats

    def changes_of(self, split: int, plans: Sequence[Sequence[Proposal]]) -> Tensor:
        return torch.stack([torch.stack([self.changes[split][proposal] for proposal in plan]).sum(0) for plan in plans])

    def forks(self, plans: Sequence[Sequence[Proposal]], *situation: object) -> tuple[Tensor, Tensor]:
        self.asked += map(tuple, plans)
        self.lengths.append(situation[-2:])
        return self.changes_of(0, plans), self.changes_of(1, plans)

    def gains(self, split: int, plans: list[Plan], price: float, errors: float) -> dict[Plan, float]:
        change, error = estimate(self.changes_of(split, plans))
        prices = torch.tensor([sum(-price if a == PRUNE else price for a, _ in plan) for plan in plans]) * SIZE
        return dict(zip(plans, (-change - errors * error - prices).tolist(), strict=True))

    def plan(
        self, price: float, candidates: int = E, allowed: Masks = ALL, at_once: int = E, every: int = 1, step: int = 4
    ) -> Plan:
        controller = build(ground_truth.MeasuredPolicy(price, 0.9, candidates, steps=7, repeats=3, every=every))
        assert not list(controller.parameters())
        given: Any = {"taylor_saliency": lambda *asked: Scores(self.saliency, None), "fork_proposals": self.forks}
        with mock.patch.multiple(ground_truth, **given):
            return tuple(controller.plan(situation(allowed, self.load, step, at_once)))


@settings(max_examples=60)
@given(seeds, masks, prices, st.integers(1, E), st.integers(1, E))
@example(0, [(False, False)] * E, 0.0, E, E)
def test_the_signal_split_chooses_and_the_gate_split_decides(
    seed: int, allowed: Masks, price: float, candidates: int, at_once: int
) -> None:
    bench = Bench(seed)
    found = bench.plan(price, candidates, allowed, at_once)
    growable, prunable = ([e for e in range(E) if allowed[e][action]] for action in (GROW, PRUNE))
    busiest = sorted(growable, key=lambda e: float(bench.load[e]), reverse=True)[:candidates]
    idlest = sorted(prunable, key=lambda e: float(bench.saliency[e]))[: min(candidates, at_once)]
    expected: list[Plan] = [(Proposal(GROW, e),) for e in busiest]
    expected += [tuple(Proposal(PRUNE, e) for e in idlest[: i + 1]) for i in range(len(idlest))]
    assert sorted(bench.asked) == sorted(expected) and bench.lengths == ([(7, 3)] if expected else [])
    if not expected:
        assert not found
        return
    signal, gate = bench.gains(0, expected, price, 0), bench.gains(1, expected, price, Z)
    choice = max(signal, key=lambda plan: signal[plan])
    assert found == (choice if gate[choice] > 0 else ())


@pytest.mark.parametrize("action", [GROW, PRUNE])
def test_a_gain_that_the_gate_split_does_not_show_is_none(action: Action) -> None:
    bench = Bench(0)
    bench.changes[:] = 0.5
    bench.changes[0, action, 3], bench.saliency[3] = -0.5, 0
    assert not bench.plan(0.001, at_once=1)
    bench.changes[1, action, 3] = -0.5
    assert bench.plan(0.001, at_once=1) == (Proposal(action, 3),)


def test_what_gains_only_together_is_found() -> None:
    bench = Bench(0)
    bench.changes[:] = 0.5
    bench.saliency = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    bench.changes[:, PRUNE, 0], bench.changes[:, PRUNE, 2] = 0.1, -0.3
    assert bench.plan(0.001) == (Proposal(PRUNE, 0), Proposal(PRUNE, 2))


@pytest.mark.parametrize(("every", "steps"), [(1, [4, 8, 12, 16, 20, 24]), (2, [4, 12, 20]), (3, [4, 16])])
def test_it_measures_at_the_first_of_so_many_chances(every: int, steps: list[int]) -> None:
    bench, asked = Bench(0), []
    for step in range(4, 28, 4):
        bench.asked.clear()
        bench.plan(0.0, every=every, step=step)
        asked += [step] if bench.asked else []
    assert asked == steps


def test_a_predicted_policy_reads_the_head_of_its_seed(tmp_path: Path) -> None:
    f, c = len(FEATURES), len(CHANGES)
    for seed, gaining in ((0, Change.GROW), (1, Change.RECOVERED)):
        log_sizes, weights = torch.full((c, len(SIZES)), -3.0), torch.ones(c, 1)
        log_sizes[:, 0], weights[gaining] = 0, -1
        scales = (torch.zeros(f), torch.ones(f), torch.ones(c), torch.zeros(1, f))
        save_head(CounterfactualHead(*scales, log_sizes, torch.ones(c, 1, 1), weights), tmp_path / f"seed-{seed}")
    policy, shown = ground_truth.PredictedPolicy(tmp_path, price=1e-8, certainty=0.9), situation(ALL)
    with mock.patch.object(ground_truth, "situation_features", lambda situation, course: torch.zeros(E, f)):
        assert [build(policy, seed).propose(shown) for seed in (0, 1)] == [(GROW, 0), (PRUNE, 0)]
    with pytest.raises(UserError, match=r"seed-2.* is missing"):
        build(policy, 2)
