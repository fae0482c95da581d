"""Regret compares the choice of a signal with the best there was, and both are what removing experts really costs."""

from collections.abc import Collection, Iterable
from itertools import combinations
from math import inf
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phasegate.signals.removal_cost import Removals, lowest_sets
from phasegate.surgery.operations import ExpertManager
from phasegate.surgery.probe import Probe
from tests.models import losses_after_removal, random_model, seeds, split

ranks = st.lists(st.integers(0, 3).map(float), min_size=6, max_size=6)  # with ties


def study(seed: int, siblings: bool = False, **changes: Any) -> Probe:
    """Of a random layer with six experts, whose ids are not their indices."""
    model, examples = random_model(seed, n_routed=6 if siblings else 7, **changes)
    if siblings:
        split(model.layers[1], 3)
    ExpertManager(model.layers[1]).remove(0)
    return Probe(model, 1, examples)


def loss_without(probe: Probe, gone: Iterable[int]) -> float:
    return float(losses_after_removal(probe, gone).mean())


def lowest(scores: list[float], count: int) -> list[tuple[int, ...]]:
    """All sets of which no member has a higher score than any expert outside."""
    n = range(len(scores))
    sets = combinations(n, count)
    return [some for some in sets if all(scores[i] <= scores[j] for i in some for j in n if j not in some)]


@given(st.data(), st.lists(st.integers(0, 4).map(float), min_size=1, max_size=8), st.integers(1, 20))
def test_the_lowest_sets_are_all_ways_to_break_the_ties(data: st.DataObject, scores: list[float], most: int) -> None:
    count = data.draw(st.integers(1, len(scores)))
    found, expected = [tuple(sorted(some)) for some in lowest_sets(scores, count)], lowest(scores, count)
    assert sorted(found) == expected
    few = [tuple(sorted(some)) for some in lowest_sets(scores, count, most)]
    assert few == found if len(expected) <= most else len(few) == most and set(few) <= set(expected)


def test_of_too_many_ways_to_break_a_tie_some_are_drawn_evenly() -> None:
    scores = [0.0, *[1.0] * 20, 2.0]
    drawn = list(lowest_sets(scores, 11, 1000))
    share = [sum(i in some for some in drawn) / 1000 for i in range(22)]
    assert share[0] == 1 and share[21] == 0 and share[1:21] == pytest.approx([0.5] * 20, abs=0.08)
    assert all(len(set(some)) == 11 for some in drawn) and drawn == list(lowest_sets(scores, 11, 1000))


def check_choices(removals: Removals, scores: list[float], count: int) -> None:
    """What a signal's choice costs is the mean over all ways to break ties."""
    losses = {gone: loss_without(removals.probe, gone) for gone in combinations(range(6), count)}
    assert {gone: removals.loss(gone) for gone in losses} == pytest.approx(losses, rel=1e-9)
    ways = lowest(scores, count)
    expected = sum(losses[gone] for gone in ways) / len(ways)
    assert removals.chosen(torch.tensor(scores), count) == pytest.approx(expected, rel=1e-9)
    assert removals.chosen(torch.zeros(6), count) == pytest.approx(sum(losses.values()) / len(losses), rel=1e-9)


def chosen(removals: Removals, gone: Collection[int]) -> float:
    """What a signal costs that chooses these experts."""
    return removals.chosen(torch.tensor([float(e not in gone) for e in range(6)]), len(gone))


@settings(max_examples=15)
@given(seed=seeds, count=st.integers(1, 3), scores=ranks)
def test_where_all_sets_can_be_tried_the_best_is_the_best(seed: int, count: int, scores: list[float]) -> None:
    probe = study(seed)
    removals = Removals(probe)
    check_choices(removals, scores, count)
    best = min(combinations(range(6), count), key=lambda gone: loss_without(probe, gone))
    assert removals.exhaustive and removals.lowest(count) == pytest.approx(loss_without(probe, best), rel=1e-9)
    assert chosen(removals, best) == removals.lowest(count) <= removals.chosen(torch.tensor(scores), count)


@pytest.mark.parametrize("siblings, stem", [(True, "mlp"), (False, "conv")])
@settings(max_examples=3)
@given(seed=seeds, scores=ranks)
def test_elsewhere_experts_go_one_by_one(siblings: bool, stem: str, seed: int, scores: list[float]) -> None:
    probe, gone = study(seed, siblings, stem=stem), tuple[int, ...]()
    removals = Removals(probe)
    assert not removals.exhaustive
    for count in (1, 2, 3):
        gone = min(((*gone, e) for e in range(6) if e not in gone), key=lambda some: loss_without(probe, some))
        assert removals.lowest(count) == pytest.approx(loss_without(probe, gone), rel=1e-9)
        assert chosen(removals, gone) == pytest.approx(removals.lowest(count), rel=1e-9)
    for count in (1, 2):
        check_choices(removals, scores, count)


@pytest.mark.parametrize("siblings", [True, False])
def test_too_few_experts_can_not_be_left(siblings: bool) -> None:
    removals = Removals(study(0, siblings))
    assert [removals.lowest(count) < inf for count in (4, 5, 6, 7)] == [True, False, False, False]
    assert removals.chosen(torch.arange(6.0), 4) < removals.chosen(torch.arange(6.0), 5) == inf
