"""Controllers label as they say, learn what can be learned, and propose only what is allowed."""

from typing import NoReturn, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from phasegate.control import (
    GROW,
    KEEP,
    PRUNE,
    Acts,
    Allowed,
    Control,
    ControlHead,
    Controller,
    HeadControl,
    HeadController,
    LabelControl,
    LabelController,
    Plan,
    Proposal,
    Situation,
    entropy_labels,
    random_labels,
    usage_labels,
)
from phasegate.phase_params import EntropyLabels, RandomLabels, UsageLabels
from phasegate.probe import Probe
from phasegate.signals import N_SCALARS, ExpertSignals

WIDTH = 4
NOISE = RandomLabels(grow=0.3, prune=0.2, loss_weight=1.0, head_lr=0.01)
ENTROPY = EntropyLabels(grow_below=0.9, prune_above=1.1, head_lr=0.01)


NO_PROBE = cast(Probe, None)  # nobody asks


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def signals(n: int, seed: int = 0) -> ExpertSignals:
    """Signals of n experts whose tokens, loads and entropies are random."""
    random = torch.Generator().manual_seed(seed)
    load, gate, entropy = torch.rand(3, n, generator=random)
    token = torch.randn(n, WIDTH, generator=random, requires_grad=True)
    return ExpertSignals(load, gate, entropy, token, entropy.mean())


def situation(
    given: ExpertSignals, allowed: Allowed | None = None, seed: int = 0, losses: list[float] | None = None
) -> Situation:
    """What a controller is shown; everything is allowed unless said otherwise, and a prune costs its `losses`."""

    def loss_after(proposal: Proposal) -> float:
        assert losses is not None, "nobody needs to know the loss"
        assert proposal.action == "prune"
        return losses[proposal.expert]

    yes = torch.ones(len(given.load), dtype=torch.bool)

    def unasked(*questions: object) -> NoReturn:
        raise AssertionError("nobody needs to know")

    known = (given, allowed or Allowed(yes, yes), loss_after, draws(seed))
    return Situation(*known, features=unasked, removals=unasked, forks=unasked, expert_size=1, probe=NO_PROBE)


@given(st.integers(0, 10), st.integers(0, 10), st.integers(0, 10**6))
def test_random_labels_have_the_stated_frequencies(grow: int, prune: int, seed: int) -> None:
    total = max(grow + prune, 10)
    expected = torch.tensor([grow, prune, total - grow - prune]) / total
    labels = random_labels(grow / total, prune / total)(signals(20_000), draws(seed))
    found = labels.bincount(minlength=3) / len(labels)
    assert (found - expected).abs().max() < 0.02 and (found[expected == 0] == 0).all()


def test_random_labels_are_drawn_anew() -> None:
    label, random = random_labels(0.3, 0.2), draws()
    assert not torch.equal(label(signals(100), random), label(signals(100), random))
    assert torch.equal(label(signals(100, 1), draws()), label(signals(100, 2), draws()))


def test_usage_labels_follow_the_thresholds_in_even_shares() -> None:
    load = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05])
    given = ExpertSignals(load, load, load, torch.zeros(5, WIDTH), torch.tensor(0.5))
    assert usage_labels(1.5, 0.5)(given, draws()).tolist() == [GROW, KEEP, KEEP, KEEP, PRUNE]
    assert usage_labels(1.2, 0.8)(given, draws()).tolist() == [GROW, GROW, KEEP, PRUNE, PRUNE]


def test_entropy_labels_follow_the_thresholds() -> None:
    entropy = torch.tensor([0.50, 0.44, 0.46, 0.54, 0.56, 0.44])
    load = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2, 0.0])
    given = ExpertSignals(load, load, entropy, torch.zeros(6, WIDTH), torch.tensor(0.5))
    labels = entropy_labels(0.9, 1.1)(given, draws())
    assert labels.tolist() == [KEEP, GROW, KEEP, KEEP, PRUNE, PRUNE]


labels = st.sampled_from([NOISE, ENTROPY])
any_labels = st.sampled_from([NOISE, ENTROPY, UsageLabels(grow_above=1.5, prune_below=0.5)])
acts = st.sampled_from(["sample", "argmax", "never"])
masks = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=8)
plans = st.builds(Plan, st.integers(0, 4), st.integers(0, 4), st.sampled_from(["usage", "loss"]))
controls = st.one_of(st.builds(LabelControl, any_labels), st.builds(HeadControl, labels, acts, st.booleans()), plans)


def built(control: Control) -> Controller:
    return control.build(WIDTH, 0, torch.device("cpu"))


@given(controls, masks, st.integers(0, 10**6))
def test_nothing_is_proposed_that_is_not_allowed(control: Control, masks: list[tuple[bool, bool]], seed: int) -> None:
    torch.manual_seed(seed)
    controller, allowed = built(control), Allowed(*torch.tensor(masks).T)
    for s in range(seed, seed + 10):
        shown = situation(signals(len(masks), s), allowed, s, torch.rand(len(masks)).tolist())
        proposal = controller.propose(shown)
        assert proposal is None or bool(getattr(allowed, proposal.action)[proposal.expert])
        assert proposal is None or not isinstance(control, HeadControl) or control.acts != "never"


def test_labels_act_alone_on_every_expert_they_name_and_on_no_other() -> None:
    def label(signals: ExpertSignals, generator: torch.Generator) -> Tensor:
        return torch.tensor([GROW, KEEP, PRUNE, GROW])

    proposals = {LabelController(label).propose(situation(signals(4), seed=s)) for s in range(100)}
    assert proposals == {("grow", 0), ("prune", 2), ("grow", 3)}


def test_the_plain_controller_leaves_everything_as_it_is() -> None:
    controller = Controller()
    assert controller.propose(situation(signals(4))) is None
    assert controller.loss(signals(4), draws()) == 0 and controller.parameters() == []


@pytest.mark.parametrize("control", [LabelControl(NOISE), Plan(2)])
def test_only_heads_learn(control: Control) -> None:
    assert built(control).loss(signals(4), draws()) == 0 and built(control).parameters() == []


def test_the_heads_loss_has_the_weight_of_its_labels() -> None:
    losses = []
    for weight in (1.0, 3.0):
        torch.manual_seed(0)
        controller = built(HeadControl(NOISE.model_copy(update={"loss_weight": weight}), "never"))
        losses.append(torch.as_tensor(controller.loss(signals(6), draws())).item())
    assert losses[1] == pytest.approx(3 * losses[0]) and losses[0] > 0


@pytest.mark.parametrize("acts", ["argmax", "sample"])
def test_a_head_learns_a_learnable_label_and_then_decides_by_it(acts: Acts) -> None:
    def label(signals: ExpertSignals, generator: torch.Generator) -> Tensor:
        return torch.where(signals.token[:, 0] > 0.5, GROW, torch.where(signals.token[:, 0] < -0.5, PRUNE, KEEP))

    torch.manual_seed(0)
    controller = HeadController(label, ControlHead(WIDTH + N_SCALARS), weight=1.0, detach=True, acts=acts)
    optimizer = torch.optim.Adam(controller.parameters(), lr=0.01)
    losses = []
    for step in range(400):
        optimizer.zero_grad()
        loss = controller.loss(signals(20, step), draws())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9 and sum(losses[-20:]) / 20 < 0.25
    right = 0
    for step in range(1_000, 1_050):
        given = signals(8, step)
        proposal = controller.propose(situation(given, seed=step))
        if proposal is not None:
            right += int(label(given, draws())[proposal.expert]) == (GROW if proposal.action == "grow" else PRUNE)
    assert right >= 40


@pytest.mark.parametrize("detach", [True, False])
def test_the_heads_gradient_reaches_the_trunk_unless_it_is_detached(detach: bool) -> None:
    torch.manual_seed(0)
    given = signals(6)
    controller = built(HeadControl(NOISE, acts="never", detach=detach))
    torch.as_tensor(controller.loss(given, draws())).backward()  # type: ignore[no-untyped-call]
    assert (given.token.grad is None) == detach
    assert all(parameter.grad is not None for parameter in controller.parameters())


def busiest(given: ExpertSignals, among: Tensor, sign: int = 1) -> int:
    """The expert of the greatest load (sign -1: the least) among those of a mask."""
    return max((sign * float(load), e) for e, load in enumerate(given.load) if among[e])[1]


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 10**6), st.lists(masks.filter(len), max_size=12))
def test_a_plan_by_usage_grows_the_busiest_and_then_prunes_the_least_used_of_those_allowed(
    grow: int, prune: int, seed: int, rounds: list[list[tuple[bool, bool]]]
) -> None:
    controller, left = built(Plan(grow, prune)), ["grow"] * grow + ["prune"] * prune
    for s, masks in enumerate(rounds, start=seed):
        given, allowed = signals(len(masks), s), Allowed(*torch.tensor(masks).T)
        proposal = controller.propose(situation(given, allowed))
        if left and getattr(allowed, left[0]).any():
            action = left.pop(0)
            sign = 1 if action == "grow" else -1
            assert proposal == (action, busiest(given, getattr(allowed, action), sign))
        else:
            assert proposal is None


def test_a_plan_waits_while_nothing_is_allowed_and_is_then_carried_out_once() -> None:
    controller, no, yes = built(Plan(1, 1)), torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    masks = [Allowed(no, yes), Allowed(no, no), Allowed(yes, no), Allowed(yes, no), Allowed(no, yes), Allowed(yes, yes)]
    proposals = [controller.propose(situation(signals(3), allowed)) for allowed in masks]
    assert [proposal and proposal.action for proposal in proposals] == [None, None, "grow", None, "prune", None]


@given(st.integers(0, 10**6), st.lists(st.booleans(), min_size=1, max_size=8).filter(any))
def test_a_plan_by_loss_asks_what_each_allowed_prune_would_cost_and_takes_the_cheapest(
    seed: int, prunable: list[bool]
) -> None:
    n, asked = len(prunable), list[Proposal]()
    losses: list[float] = torch.rand(n, generator=draws(seed)).tolist()
    allowed = Allowed(torch.ones(n, dtype=torch.bool), torch.tensor(prunable))
    controller, given = built(Plan(1, 1, "loss")), signals(n, seed)
    assert controller.propose(situation(given, allowed)) == ("grow", int(given.load.argmax()))  # without asking

    def loss_after(proposal: Proposal) -> float:
        asked.append(proposal)
        return losses[proposal.expert]

    found = controller.propose(situation(given, allowed)._replace(loss_after=loss_after))
    assert sorted(asked) == [("prune", e) for e in range(n) if prunable[e]]
    assert found == min(asked, key=lambda proposal: losses[proposal.expert])


def test_every_layer_has_a_plan_of_its_own() -> None:
    plan = Plan(1)
    assert [built(plan).propose(situation(signals(3))) is not None for _ in range(2)] == [True, True]
