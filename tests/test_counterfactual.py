"""Forks measure what an operation changes and nothing else, with standard errors that can be believed."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from phasegate.checkpoint import load
from phasegate.counterfactual import Estimate, Forks, Operation, estimate, removals
from phasegate.expert_manager import ExpertManager
from phasegate.model import Model
from phasegate.oracle import losses_without_each
from phasegate.phase_params import Schedule
from phasegate.probe import Probe
from phasegate.sections import override
from phasegate.training import Course, load_examples

CPU = torch.device("cpu")


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 10**6))
def test_an_estimate_is_the_mean_with_the_errors_of_two_crossed_samples(repeats: int, examples: int, seed: int) -> None:
    changes = torch.randn(3, repeats, examples, generator=torch.Generator().manual_seed(seed)).double()
    found = estimate(changes)
    for p, table in enumerate(changes.tolist()):
        mean = sum(map(sum, table)) / (repeats * examples)
        of_example = [sum(column) / repeats for column in zip(*table, strict=True)]
        of_repeat = [sum(row) / examples for row in table]
        variance = sum((value - mean) ** 2 for value in of_example) / (examples - 1) / examples
        if repeats > 1:
            variance += sum((value - mean) ** 2 for value in of_repeat) / (repeats - 1) / repeats
        assert found.change[p] == pytest.approx(mean) and found.error[p] == pytest.approx(variance**0.5)
        assert estimate(changes[p]).change == found.change[p]


@pytest.mark.parametrize("sizes", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.1, 1.0, 0.5)])
def test_the_standard_error_is_that_of_the_mean_or_a_little_more(sizes: tuple[float, float, float]) -> None:
    repeats, examples, times, draws = 3, 20, 20_000, torch.Generator().manual_seed(0)
    of_repeat, of_example, of_both = (
        size * torch.randn(times, *shape, generator=draws)
        for size, shape in zip(sizes, ((repeats, 1), (1, examples), (repeats, examples)), strict=True)
    )
    found = estimate(0.3 + of_repeat + of_example + of_both)
    true, claimed = float(found.change.var()), float(found.error.square().mean())
    counted_twice = sizes[2] ** 2 / (repeats * examples)
    assert found.change.mean() == pytest.approx(0.3, abs=0.02)
    assert claimed == pytest.approx(true + counted_twice, rel=0.05) and claimed > 0.95 * true


@given(*[st.floats(-1, 1, width=32)] * 2, st.floats(0, 1, width=32))
def test_a_certain_gain_is_what_is_left_after_the_price_and_two_errors(
    change: float, price: float, error: float
) -> None:
    gain = Estimate(torch.tensor([change]), torch.tensor([error])).gain(price)
    assert gain.tolist() == pytest.approx([-change - price - 2 * error], abs=1e-6)


@pytest.fixture
def forks(prepared: Path, baselines: Path, schedule: Schedule) -> Callable[..., Forks]:
    """Makes forks of the baseline, in one layer of which an expert has been split."""
    train, signal, gate = load_examples(prepared, CPU)
    start = load(baselines / "seed-0", gate)
    assert isinstance(start.model, Model) and start.optimizer is not None
    ExpertManager(start.model.layers[1], start.optimizer).split(1, *plane(0))
    course = Course(train, signal, gate, start.record.training, override(schedule, {"max_experts": 9}, ""), 0)
    return functools.partial(Forks, start.model, start.optimizer, course)


def plane(seed: int) -> tuple[Tensor, float]:
    return torch.randn(16, generator=torch.Generator().manual_seed(seed)), 0.1


def nothing(manager: ExpertManager, repeat: int) -> None:
    """The operation that does nothing."""


def split(manager: ExpertManager, repeat: int) -> None:
    manager.split(2, *plane(repeat))


def removed(expert: int) -> Operation:
    return lambda manager, repeat: manager.remove(expert)


def test_nothing_changes_nothing_and_all_else_changes_something(forks: Callable[..., Forks]) -> None:
    for split_changes in forks(3, 2).measure(1, 4, [nothing, split, removed(2)]):
        assert split_changes.shape[:2] == (3, 2) and not split_changes[0].any()
        assert split_changes[1:].any(-1).all()
    assert forks(3, 2).measure(0, 4, []).gate.shape == (0, 2, 200)


def test_at_once_a_split_changes_nothing_and_a_removal_what_the_oracle_says(forks: Callable[..., Forks]) -> None:
    made = forks(0, 1)
    changes = made.measure(1, 4, [split, *map(removed, range(6))])
    for found, examples in zip(changes, (made.course.signal, made.course.gate), strict=True):
        torch.testing.assert_close(found[0, 0], torch.zeros(len(examples)), rtol=0, atol=1e-5)
        probe = Probe(made.model, 1, examples)
        torch.testing.assert_close(found[1:, 0], losses_without_each(probe) - probe.losses, rtol=0, atol=1e-5)
        at_once = removals(probe)
        torch.testing.assert_close(at_once.change, found[1:, 0].mean(1), rtol=0, atol=1e-5)
        error = found[1:, 0].std(1) / len(examples) ** 0.5
        torch.testing.assert_close(at_once.error, error, rtol=1e-3, atol=1e-6)


def test_an_expert_that_can_not_go_costs_infinitely_much_for_certain(forks: Callable[..., Forks]) -> None:
    made = forks(3, 2)
    for expert in (0, 2, 3):
        ExpertManager(made.model.layers[1], made.optimizer).remove(expert)
    change, error = removals(Probe(made.model, 1, made.course.signal))  # family 4, and that of 1 and 5, are left
    assert change.tolist() == [0, float("inf"), 0] and not error.any()  # a half that its twin can stand in for is free


def test_training_goes_on_as_the_phase_would_from_that_step(forks: Callable[..., Forks]) -> None:
    early, late, over = (forks(3, 1).measure(1, step, [removed(2)]).signal for step in (0, 57, 60))
    at_once = forks(0, 1).measure(1, 0, [removed(2)]).signal
    assert torch.equal(over, at_once)  # no step of the schedule is left
    assert 0 < (late - at_once).norm() < 0.1 * (early - at_once).norm()  # its rate falls to zero


def test_measuring_leaves_model_optimizer_and_gradients_as_they_were(forks: Callable[..., Forks]) -> None:
    made = forks(3, 2)
    model, optimizer = made.model, made.optimizer
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    objects = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    weights, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():  # as where controllers ask
        assert made.measure(1, 4, [split, removed(2)]).signal.all(-1).any()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is not None and (parameter.grad == 1).all() for parameter in model.parameters())
    now = optimizer.state_dict()
    assert now["param_groups"] == states["param_groups"] and now["state"].keys() == states["state"].keys()
    for key, state in states["state"].items():
        assert state and all(torch.equal(value, now["state"][key][name]) for name, value in state.items())
    assert objects == [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in model.parameters()} == set(objects)


def test_the_same_question_has_the_same_answer_whatever_else_is_asked(forks: Callable[..., Forks]) -> None:
    first, again, alone, short = (
        forks(3, repeats).measure(1, 4, operations)
        for repeats, operations in ((3, [split, removed(2)]), (3, [split, removed(2)]), (3, [removed(2)]), (2, [split]))
    )
    for one, same, other, less in zip(first, again, alone, short, strict=True):
        assert torch.equal(one, same) and torch.equal(one[1:], other) and torch.equal(one[:1, :2], less)


def test_every_repeat_has_batches_of_its_own_and_says_which_it_is(forks: Callable[..., Forks]) -> None:
    heard: list[int] = []
    changes = forks(3, 3).measure(1, 4, [removed(2), lambda manager, repeat: heard.append(repeat)]).gate[0]
    assert heard == [0, 1, 2]
    assert not any(torch.equal(changes[i], changes[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
