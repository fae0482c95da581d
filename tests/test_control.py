"""Controllers label as they say, learn what can be learned, and propose only what is allowed."""

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
    HeadController,
    LabelController,
    entropy_labels,
    random_labels,
)
from phasegate.params import EntropyLabels, RandomLabels
from phasegate.signals import N_SCALARS, ExpertSignals

WIDTH = 4
NOISE = RandomLabels(grow=0.3, prune=0.2, loss_weight=1.0, head_lr=0.01)
ENTROPY = EntropyLabels(grow_below=0.9, prune_above=1.1, head_lr=0.01)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def signals(n: int, seed: int = 0) -> ExpertSignals:
    """Signals of n experts whose tokens, loads and entropies are random."""
    random = torch.Generator().manual_seed(seed)
    load, gate, entropy = torch.rand(3, n, generator=random)
    token = torch.randn(n, WIDTH, generator=random, requires_grad=True)
    return ExpertSignals(load, gate, entropy, token, entropy.mean())


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


def test_entropy_labels_follow_the_thresholds() -> None:
    entropy = torch.tensor([0.50, 0.44, 0.46, 0.54, 0.56, 0.44])
    load = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2, 0.0])
    given = ExpertSignals(load, load, entropy, torch.zeros(6, WIDTH), torch.tensor(0.5))
    labels = entropy_labels(0.9, 1.1)(given, draws())
    assert labels.tolist() == [KEEP, GROW, KEEP, KEEP, PRUNE, PRUNE]


@given(
    control=st.builds(Control, st.sampled_from([NOISE, ENTROPY]), head=st.booleans(), acts=st.booleans()),
    masks=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=8),
    seed=st.integers(0, 10**6),
)
def test_nothing_is_proposed_that_is_not_allowed(control: Control, masks: list[tuple[bool, bool]], seed: int) -> None:
    torch.manual_seed(seed)
    controller = control.build(WIDTH, torch.device("cpu"))
    allowed = Allowed(*torch.tensor(masks).T)
    proposals = [controller.propose(signals(len(masks), s), allowed, draws(s)) for s in range(seed, seed + 10)]
    for proposal in filter(None, proposals):
        assert control.acts and getattr(allowed, proposal.action)[proposal.expert]


def test_labels_act_alone_on_every_expert_they_name_and_on_no_other() -> None:
    def label(signals: ExpertSignals, generator: torch.Generator) -> Tensor:
        return torch.tensor([GROW, KEEP, PRUNE, GROW])

    yes = torch.ones(4, dtype=torch.bool)
    proposals = {LabelController(label).propose(signals(4), Allowed(yes, yes), draws(s)) for s in range(100)}
    assert proposals == {("grow", 0), ("prune", 2), ("grow", 3)}
    assert Controller().propose(signals(4), Allowed(yes, yes), draws()) is None


@pytest.mark.parametrize("acts", ["argmax", "sample"])
def test_a_head_learns_a_learnable_label_and_then_decides_by_it(acts: Acts) -> None:
    def label(signals: ExpertSignals, generator: torch.Generator) -> Tensor:
        return torch.where(signals.token[:, 0] > 0.5, GROW, torch.where(signals.token[:, 0] < -0.5, PRUNE, KEEP))

    torch.manual_seed(0)
    controller = HeadController(label, ControlHead(WIDTH + N_SCALARS), acts=acts)
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
        given, yes = signals(8, step), torch.ones(8, dtype=torch.bool)
        proposal = controller.propose(given, Allowed(yes, yes), draws(step))
        if proposal is not None:
            right += int(label(given, draws())[proposal.expert]) == (GROW if proposal.action == "grow" else PRUNE)
    assert right >= 40


@pytest.mark.parametrize("detach", [True, False])
def test_the_heads_gradient_reaches_the_trunk_unless_it_is_detached(detach: bool) -> None:
    torch.manual_seed(0)
    given = signals(6)
    controller = Control(NOISE, head=True, acts=False, detach=detach).build(WIDTH, torch.device("cpu"))
    torch.as_tensor(controller.loss(given, draws())).backward()  # type: ignore[no-untyped-call]
    assert (given.token.grad is None) == detach
    assert all(parameter.grad is not None for parameter in controller.parameters())
