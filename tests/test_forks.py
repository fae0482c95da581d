"""Forks measure what an operation changes and nothing else, with standard errors that can be believed."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, variance
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from phasegate.params.fields import override
from phasegate.params.phases import Schedule
from phasegate.signals.forks import Estimate, estimate, fork_proposals, removals
from phasegate.signals.oracle import losses_without_each
from phasegate.surgery.controllers import Action, Allowed, Proposal, Situation
from phasegate.surgery.operations import ExpertManager
from phasegate.surgery.probe import Probe
from phasegate.training import loop, predictions
from phasegate.training.batches import Examples
from phasegate.training.course import load_start
from tests.models import Forks, draws, removed, seeds, unchanged

Make = Callable[..., Forks]


@given(st.integers(1, 4), st.integers(2, 5), seeds)
def test_an_estimate_has_the_errors_of_two_crossed_samples(repeats: int, examples: int, seed: int) -> None:
    changes = torch.randn(3, repeats, examples, generator=draws(seed)).double()
    found, of_batches = estimate(changes), []
    for table in changes.tolist():
        columns, means = zip(*table, strict=True), [fmean(row) for row in table]
        if repeats > 1:
            within = fmean(variance(column) for column in columns)
            of_batches.append((examples * variance(means) - within) / (examples - 1))
    shared = max(0.0, fmean(of_batches)) / repeats if of_batches else 0.0
    for table, *result in zip(changes.tolist(), *found, strict=True):
        of_example = [fmean(column) for column in zip(*table, strict=True)]
        expected = [fmean(of_example), (variance(of_example) / examples + shared) ** 0.5]
        assert list(map(float, result)) == pytest.approx(expected)


@pytest.mark.parametrize("sizes", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.1, 1.0, 0.5)])
def test_the_standard_error_is_that_of_the_mean(sizes: tuple[float, float, float]) -> None:
    repeats, examples, random = 3, 20, draws()
    shapes = ((repeats, 1), (1, examples), (repeats, examples))
    samples = [size * torch.randn(20_000, *shape, generator=random) for size, shape in zip(sizes, shapes, strict=True)]
    found = estimate(0.3 + samples[0] + samples[1] + samples[2])
    assert found.change.mean() == pytest.approx(0.3, abs=0.02)
    assert found.error.square().mean() == pytest.approx(float(found.change.var()), rel=0.05)


def test_what_batches_add_is_pooled_over_operations() -> None:
    shared = torch.randn(2000, 3, 2, 1, generator=draws())  # 2000 times, of 3 operations, 2 repeats
    errors = torch.stack([estimate(changes.expand(-1, -1, 5)).error for changes in shared])
    assert (errors == errors[:, :1]).all()
    alone = torch.cat([estimate(changes.expand(1, -1, 5)).error for changes in shared[:, :1].unbind()])
    assert errors[:, 0].square().var() < 0.5 * alone.square().var()


@given(*[st.floats(-1, 1, width=32)] * 2, st.floats(0, 1, width=32))
def test_a_gain_is_what_the_loss_falls_with_the_wanted_probability(change: float, price: float, error: float) -> None:
    measured = Estimate(torch.tensor([change]), torch.tensor([error]))
    for certainty, errors in ((0.5, 0.0), (0.9, 1.2815516), (0.975, 1.9599640)):
        assert measured.gain(price, certainty).tolist() == pytest.approx([-change - price - errors * error], abs=1e-6)


@pytest.fixture
def forks(prepared: Path, baselines: Path, schedule: Schedule) -> Make:
    """Makes forks of the baseline, in one layer of which an expert has been split."""
    model, optimizer, course = load_start(prepared, baselines / "seed-0", 0, override(schedule, {"max_experts": 9}, ""))
    ExpertManager(model.layers[1], optimizer).split(1, torch.randn(16, generator=draws()), 0.1)
    return functools.partial(Forks, model, optimizer, course)


def nothing(manager: ExpertManager, draws: torch.Generator) -> None:
    """The operation that does nothing."""


def split(manager: ExpertManager, draws: torch.Generator) -> None:
    manager.split(2, torch.randn(16, generator=draws), 0.1)


def test_nothing_changes_nothing_and_all_else_changes_something(forks: Make) -> None:
    for split_changes in forks(3, 2).measure(1, 4, [nothing, split, removed(2)]):
        assert split_changes.shape[:2] == (3, 2) and not split_changes[0].any()
        assert split_changes[1:].any(-1).all()
    assert forks(3, 2).measure(0, 4, [])[1].shape == (0, 2, 200)


def test_a_split_changes_nothing_immediately_and_a_removal_what_the_oracle_says(
    forks: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "calibrated_losses", predictions.example_losses)  # the oracle's are as they are
    made = forks(0, 1)
    changes = made.measure(1, 4, [split, *map(removed, range(6))])
    for found, examples in zip(changes, (made.course.signal, made.course.gate), strict=True):
        torch.testing.assert_close(found[0, 0], torch.zeros(len(examples)), rtol=0, atol=1e-5)
        probe = Probe(made.model, 1, examples)
        torch.testing.assert_close(found[1:, 0], losses_without_each(probe) - probe.losses, rtol=0, atol=1e-5)
        immediate = removals(probe)
        torch.testing.assert_close(immediate.change, found[1:, 0].mean(1), rtol=0, atol=1e-5)
        error = found[1:, 0].std(1) / len(examples) ** 0.5
        torch.testing.assert_close(immediate.error, error, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("hyperplanes", ["fixed", "trained"])
def test_forks_train_hyperplanes_only_where_arms_do(
    hyperplanes: str, prepared: Path, baselines: Path, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = override(schedule, {"hyperplanes": hyperplanes, "max_experts": 9}, "")
    model, optimizer, course = load_start(prepared, baselines / "seed-0", 0, changed)
    normal, ends = torch.eye(16)[0], list[Tensor]()

    def measure(model: Any, examples: Any) -> Tensor:
        ends.append(model.layers[1].node_weight.detach())
        return torch.zeros(len(examples))

    monkeypatch.setattr(predictions, "calibrated_losses", measure)
    Forks(model, optimizer, course, 3, 1).measure(1, 4, [lambda manager, draws: manager.split(2, normal, 0.0)])
    assert torch.equal(ends[-1][0], normal) == (hyperplanes == "fixed")


def test_an_expert_that_can_not_go_costs_infinitely_much_for_certain(forks: Make) -> None:
    made = forks(3, 2)
    for expert in (0, 2, 3):
        ExpertManager(made.model.layers[1], made.optimizer).remove(expert)
    change, error = removals(Probe(made.model, 1, made.course.signal))  # family 4, and that of 1 and 5, are left
    assert change.tolist() == [0, float("inf"), 0] and not error.any()  # a half that its twin can stand in for is free


def test_training_starts_at_the_rate_of_the_phase_and_falls_to_zero(forks: Make) -> None:
    rates: list[float] = []
    with mock.patch.object(loop, "fit", lambda *given: rates.extend(given[4])):
        (made := forks(4, 1)).measure(1, 30, [])
    assert rates == loop.cosine(made.course.rates[30], 4) and rates[0] == made.course.rates[30]
    early, late = (forks(3, 1).measure(1, step, [removed(2)])[0] for step in (0, 57))
    immediate = forks(0, 1).measure(1, 0, [removed(2)])[0]
    assert 0 < (late - immediate).norm() < 0.1 * (early - immediate).norm()


def test_measuring_leaves_model_optimizer_and_gradients_as_they_were(forks: Make) -> None:
    made = forks(3, 2)
    for parameter in made.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with unchanged(made.model, made.optimizer, may_draw=True), torch.no_grad():  # as where controllers ask
        assert made.measure(1, 4, [split, removed(2)])[0].all(-1).any()


def test_the_same_question_has_the_same_answer_whatever_else_is_asked(forks: Make) -> None:
    questions = ((3, [split, removed(2)]), (3, [split, removed(2)]), (3, [removed(2)]), (2, [split]))
    first, again, alone, short = (forks(3, repeats).measure(1, 4, operations) for repeats, operations in questions)
    for one, same, other, less in zip(first, again, alone, short, strict=True):
        assert torch.equal(one, same) and torch.equal(one[1:], other) and torch.equal(one[:1, :2], less)


def test_every_repeat_has_batches_and_draws_of_its_own(forks: Make) -> None:
    heard: list[int] = []
    changes = forks(3, 3).measure(1, 4, [removed(2), lambda manager, draws: heard.append(draws.initial_seed())])[1][0]
    assert len(set(heard)) == 3
    assert not any(torch.equal(changes[i], changes[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_plan_is_all_of_its_operations_whatever_their_order(forks: Make) -> None:
    made, plans = forks(3, 2), [[2], [2, 4], [4, 2]]

    def operate(manager: ExpertManager, proposal: Proposal, draws: torch.Generator) -> Any:
        return manager.remove(int(manager.moe.expert_id[proposal.expert]))

    nobody = torch.zeros(0, dtype=torch.bool)
    probe = Probe(made.model, 1, made.course.signal)
    situation = Situation(probe, Allowed(nobody, nobody), torch.Generator(), 4, nobody, operate)
    chosen = [[Proposal(Action.PRUNE, e) for e in plan] for plan in plans]
    one, both, turned = fork_proposals(chosen, situation, made.optimizer, made.course, 3, 2)[0]
    ids = made.model.layers[1].expert_id[[2, 4]].tolist()

    def remove(manager: ExpertManager, draws: torch.Generator) -> None:
        for expert in ids:
            manager.remove(expert)

    (wanted,) = made.measure(1, 4, [remove])[0]
    assert torch.equal(both, turned) and torch.equal(both, wanted) and not torch.equal(both, one)


@given(seeds, st.floats(0.2, 5))
def test_losses_are_taken_at_the_temperature_that_suits_the_logits_best(seed: int, factor: float) -> None:
    logits, y = torch.randn(40, 3, generator=draws(seed)), torch.randint(3, (40,), generator=draws(seed))
    logits[range(40), y] += 1
    examples = Examples(torch.zeros(40), y)

    def calibrated(logits: Tensor) -> Tensor:
        with mock.patch.object(predictions, "first_task_logits", lambda *asked: logits):
            return predictions.calibrated_losses(mock.Mock(), examples)

    tried = [float(F.cross_entropy(float(scale) * logits, y)) for scale in torch.linspace(0.1, 10, 100)]
    found = calibrated(factor * logits)
    assert found.mean() <= min(tried) + 1e-5 and found.mean() == pytest.approx(min(tried), abs=0.01)
    right, wrong = calibrated(10 * F.one_hot(y, 3).float()), calibrated(-10 * F.one_hot(y, 3).float())
    assert right.max() < 1e-6 and wrong.isfinite().all()
    assert calibrated(torch.zeros(40, 3)).tolist() == pytest.approx([math.log(3)] * 40)
