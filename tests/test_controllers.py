"""Controllers label as they say, learn what can be learned, and propose only what is allowed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from phasegate.model.routing_statistics import ExpertSignals
from phasegate.params.phases import EntropyLabels, RandomLabels, UsageLabels
from phasegate.records.trial_folder import SURGERY_COLUMNS
from phasegate.surgery import controllers
from phasegate.surgery.controllers import Allowed, Controller, HeadPolicy, LabelPolicy, PlannedPolicy, Policy, label
from tests.models import draws, seeds

GROW, PRUNE, KEEP = controllers.Action
WIDTH = 4
NOISE = RandomLabels(grow=0.3, prune=0.2, loss_weight=1.0, head_lr=0.01)
ENTROPY = EntropyLabels(grow_below=0.9, prune_above=1.1, head_lr=0.01)
MODEL: Any = SimpleNamespace(spec=SimpleNamespace(architecture=SimpleNamespace(width=WIDTH)))
COURSE: Any = SimpleNamespace(
    schedule=SimpleNamespace(lr_scale=0.5), training=SimpleNamespace(lr=0.1), gate=SimpleNamespace(x=torch.zeros(1))
)


def signals(n: int, seed: int = 0) -> ExpertSignals:
    """Signals of n experts whose tokens, loads and entropies are random."""
    random = draws(seed)
    load, gate, entropy = torch.rand(3, n, generator=random)
    token = torch.randn(n, WIDTH, generator=random, requires_grad=True)
    return ExpertSignals(load, gate, entropy, token, entropy.mean())


def situation(given: ExpertSignals, allowed: Allowed | None = None, seed: int = 0) -> controllers.Situation:
    """What a controller is shown; everything is allowed unless said otherwise."""
    yes, unasked = torch.ones(len(given.load), dtype=torch.bool), mock.Mock(side_effect=AssertionError)
    probe: Any = SimpleNamespace(signals=given, block=0)
    return controllers.Situation(probe, allowed or Allowed(yes, yes), draws(seed), 4, torch.zeros(len(yes)), unasked)


def build(policy: Policy, optimizer: torch.optim.Optimizer | None = None) -> Controller:
    return policy.build(MODEL, optimizer or torch.optim.SGD([torch.zeros(1)]), COURSE)


@given(st.integers(0, 10), st.integers(0, 10), seeds)
def test_random_labels_have_the_stated_frequencies(grow: int, prune: int, seed: int) -> None:
    total = max(grow + prune, 10)
    expected = torch.tensor([grow, prune, total - grow - prune]) / total
    stated = NOISE.model_copy(update={"grow": grow / total, "prune": prune / total})
    labels = label(stated, signals(20_000), draws(seed))
    found = labels.bincount(minlength=3) / len(labels)
    assert (found - expected).abs().max() < 0.02 and (found[expected == 0] == 0).all()


def test_random_labels_are_drawn_anew_whatever_the_signals_are() -> None:
    once = draws()
    first, second, same = (label(NOISE, signals(100, s), random) for s, random in enumerate((once, once, draws())))
    assert not torch.equal(first, second) and torch.equal(first, same)


def test_usage_labels_follow_the_thresholds_in_even_shares() -> None:
    given = signals(5)._replace(load=torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05]))
    wide, narrow = [GROW, KEEP, KEEP, KEEP, PRUNE], [GROW, GROW, KEEP, PRUNE, PRUNE]
    for above, below, expected in ((1.5, 0.5, wide), (1.2, 0.8, narrow)):
        assert label(UsageLabels(grow_above=above, prune_below=below), given, draws()).tolist() == expected


def test_entropy_labels_follow_the_thresholds() -> None:
    entropy = torch.tensor([0.50, 0.44, 0.46, 0.54, 0.56, 0.44])
    load = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2, 0.0])
    given = signals(6)._replace(load=load, entropy=entropy, batch_entropy=torch.tensor(0.5))
    assert label(ENTROPY, given, draws()).tolist() == [KEEP, GROW, KEEP, KEEP, PRUNE, PRUNE]


any_labels = st.sampled_from([NOISE, ENTROPY, UsageLabels(grow_above=1.5, prune_below=0.5)])
acts = st.sampled_from(["sample", "argmax"])
masks = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=8)
plans = st.builds(PlannedPolicy, st.integers(0, 4), st.integers(0, 4), st.sampled_from(["usage", "loss"]))
heads = st.builds(HeadPolicy, st.sampled_from([NOISE, ENTROPY]), acts, st.booleans())
policies = st.one_of(st.builds(LabelPolicy, any_labels), heads, plans)


@given(policies, masks, seeds)
def test_nothing_is_proposed_that_is_not_allowed(policy: Policy, masks: list[tuple[bool, bool]], seed: int) -> None:
    torch.manual_seed(seed)
    controller, allowed = build(policy), Allowed(*torch.tensor(masks).T)
    for s in range(seed, seed + 10):
        with mock.patch.object(controllers.PlannedController, "loss_after", lambda *asked: float(torch.rand(()))):
            proposal = controller.propose(situation(signals(len(masks), s), allowed, s))
        assert proposal is None or masks[proposal.expert][proposal.action]


def test_labels_act_alone_on_every_expert_they_name_and_on_no_other() -> None:
    given = signals(4)._replace(load=torch.tensor([0.4, 0.2, 0.05, 0.35]))
    controller = build(LabelPolicy(UsageLabels(grow_above=1.3, prune_below=0.5)))
    assert {controller.propose(situation(given, seed=s)) for s in range(100)} == {(GROW, 0), (PRUNE, 2), (GROW, 3)}


@pytest.mark.parametrize("policy", [Policy(), LabelPolicy(NOISE), PlannedPolicy(2)])
def test_only_heads_learn(policy: Policy) -> None:
    controller, optimizer = build(policy), torch.optim.SGD([torch.zeros(1)])
    assert controller.loss(signals(4), draws()) == 0 and not list(controller.parameters())
    assert type(policy) is not Policy or controller.propose(situation(signals(4))) is None
    head = build(HeadPolicy(NOISE, "sample"), optimizer)
    assert optimizer.param_groups[1]["params"] == list(head.parameters())
    assert optimizer.param_groups[1]["lr_factor"] * 0.5 * 0.1 == pytest.approx(NOISE.head_lr)


def test_the_heads_loss_has_the_weight_of_its_labels() -> None:
    losses = []
    for weight in (1.0, 3.0):
        torch.manual_seed(0)
        controller = build(HeadPolicy(NOISE.model_copy(update={"loss_weight": weight}), "sample"))
        losses.append(torch.as_tensor(controller.loss(signals(6), draws())).item())
    assert losses[1] == pytest.approx(3 * losses[0]) and losses[0] > 0


@pytest.mark.parametrize("acts", ["argmax", "sample"])
def test_a_head_learns_a_learnable_label_and_then_decides_by_it(acts: Literal["argmax", "sample"]) -> None:
    torch.manual_seed(0)
    controller = build(HeadPolicy(ENTROPY, acts))
    optimizer = torch.optim.Adam(controller.parameters(), lr=0.01)
    losses = []
    for step in range(400):
        optimizer.zero_grad()
        loss = torch.as_tensor(controller.loss(signals(20, step), draws()))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9 and sum(losses[-20:]) / 20 < 0.25
    right = 0
    for seen in (signals(8, step) for step in range(1_000, 1_050)):
        if proposal := controller.propose(situation(seen)):
            right += int(label(ENTROPY, seen, draws())[proposal.expert]) == proposal.action
    assert right >= 40


@pytest.mark.parametrize("detach", [True, False])
def test_the_heads_gradient_reaches_the_trunk_unless_it_is_detached(detach: bool) -> None:
    torch.manual_seed(0)
    given, controller = signals(6), build(HeadPolicy(NOISE, acts="sample", detach=detach))
    torch.as_tensor(controller.loss(given, draws())).backward()  # type: ignore[no-untyped-call]
    assert (given.token.grad is None) == detach
    assert all(parameter.grad is not None for parameter in controller.parameters())


@given(st.dictionaries(st.integers(1, 9), st.booleans()), st.lists(masks, min_size=9, max_size=9), seeds)
def test_a_yoked_controller_repeats_operations_on_any_allowed_expert(
    plan: dict[int, bool], rounds: list[list[tuple[bool, bool]]], seed: int
) -> None:
    log = pd.DataFrame({"step": [*plan, *plan], "block": [0] * len(plan) + [1] * len(plan)}, dtype=int)
    grew = [*plan.values(), *(not grew for grew in plan.values())]
    log = log.assign(n_routed_before=5, n_routed_after=[6 if grew else 4 for grew in grew])
    log = log.reindex(columns=SURGERY_COLUMNS)
    optimizer, course = mock.Mock(), mock.Mock(seed=seed)
    with mock.patch.object(controllers, "read_table", return_value=log) as read:
        controller = controllers.YokedPolicy(Path("models/p7b1/split")).build(MODEL, optimizer, course)
    assert read.call_args.args[0] == Path(f"models/p7b1/split/seed-{seed}/surgeries.csv")
    for step, masks in enumerate(rounds, start=1):
        allowed = Allowed(*torch.tensor(masks).T)
        shown = situation(signals(len(masks)), allowed)._replace(step=step)
        may = allowed.proposals(GROW if plan[step] else PRUNE) if step in plan else []
        planned = controller.plan(shown)
        assert len(planned) == bool(may) and set(planned) <= set(may)


@given(seeds, st.integers(1, 4), st.integers(1, 4))
def test_a_yoked_arm_repeats_a_steps_operations_on_different_experts(seed: int, removed: int, at_once: int) -> None:
    log = pd.DataFrame({"step": [4] * removed, "block": 0, "n_routed_before": 5, "n_routed_after": 4})
    with mock.patch.object(controllers, "read_table", return_value=log):
        controller = controllers.YokedPolicy(Path("oracle")).build(MODEL, mock.Mock(), mock.Mock(seed=seed))
    yes = torch.ones(6, dtype=torch.bool)
    planned = controller.plan(situation(signals(6), Allowed(yes, yes, at_once)))
    assert [proposal.action for proposal in planned] == [PRUNE] * min(removed, at_once)
    assert len({proposal.expert for proposal in planned}) == len(planned)


@given(st.integers(0, 4), st.integers(0, 4), seeds, st.lists(masks, max_size=12))
def test_a_plan_by_usage_grows_the_busiest_and_then_prunes_the_least_used(
    grow: int, prune: int, seed: int, rounds: list[list[tuple[bool, bool]]]
) -> None:
    controller, left = build(PlannedPolicy(grow, prune)), [GROW] * grow + [PRUNE] * prune
    for s, masks in enumerate(rounds, start=seed):
        given = signals(len(masks), s)
        proposal = controller.propose(situation(given, Allowed(*torch.tensor(masks).T)))
        among = [e for e, mask in enumerate(masks) if mask[left[0]]] if left else []
        extreme = max if left[:1] == [GROW] else min
        assert proposal == ((left.pop(0), extreme(among, key=lambda e: float(given.load[e]))) if among else None)


@given(seeds, st.lists(st.booleans(), min_size=1, max_size=8).filter(any))
def test_a_plan_by_loss_asks_what_each_prune_costs_and_takes_the_cheapest(seed: int, prunable: list[bool]) -> None:
    n, asked = len(prunable), list[controllers.Proposal]()
    losses: Tensor = torch.rand(n, generator=draws(seed))
    shown = situation(signals(n, seed), Allowed(torch.ones(n, dtype=torch.bool), torch.tensor(prunable)))
    controller = build(PlannedPolicy(1, 1, "loss"))

    def loss_after(controller: Controller, situation: Any, proposal: controllers.Proposal) -> float:
        asked.append(proposal)
        return float(losses[proposal.expert])

    with mock.patch.object(controllers.PlannedController, "loss_after", loss_after):
        assert controller.propose(shown) == (GROW, int(shown.probe.signals.load.argmax())) and not asked
        found = controller.propose(shown)
    assert sorted(asked) == [(PRUNE, e) for e in range(n) if prunable[e]]
    assert found == min(asked, key=lambda proposal: float(losses[proposal.expert]))
