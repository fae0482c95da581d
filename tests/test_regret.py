"""Regret compares the choice of a signal with the best there was, and both are what removing experts really costs."""

import copy
from itertools import combinations
from math import comb, inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phasegate.expert_manager import ExpertManager
from phasegate.model import Model, ModelSpec
from phasegate.oracle import example_losses
from phasegate.pretraining_params import Architecture
from phasegate.probe import Probe
from phasegate.regret import Removals, lowest_sets
from phasegate.sections import override
from phasegate.training import Examples

seeds = st.integers(0, 10**6)
ranks = st.lists(st.integers(0, 3).map(float), min_size=6, max_size=6)  # with ties


def study(architecture: Architecture, seed: int, siblings: bool = False, **changes: int | str) -> Probe:
    """Of a random layer in float64 with six experts, whose ids are not their indices."""
    torch.manual_seed(seed)
    changes = {"n_routed": 6 if siblings else 7, **changes}
    model = Model(ModelSpec(override(architecture, changes, ""), (1, 8), (4,))).double().eval()
    manager = ExpertManager(model.layers[1])
    if siblings:
        manager.split(3, torch.randn(16).double(), 0.0)
        manager.moe.w_out.data += 0.1 * torch.randn_like(manager.moe.w_out)
    manager.remove(0)
    return Probe(model, 1, Examples(torch.randn(24, 1, 8).double(), torch.randint(0, 4, (24,))))


def loss_without(probe: Probe, gone: tuple[int, ...]) -> float:
    """The mean loss once these experts, by index, have been removed."""
    model = copy.deepcopy(probe.model)
    ids = model.layers[1].expert_id[list(gone)].tolist()
    for expert in ids:
        ExpertManager(model.layers[1]).remove(expert)
    return float(example_losses(model, probe.examples).mean())


def lowest(scores: list[float], count: int) -> list[tuple[int, ...]]:
    """All sets of which no member has a higher score than any expert outside."""
    n = range(len(scores))
    return [
        some for some in combinations(n, count) if all(scores[i] <= scores[j] for i in some for j in n if j not in some)
    ]


@given(st.data(), st.lists(st.integers(0, 4).map(float), min_size=1, max_size=8), st.integers(1, 20))
def test_the_lowest_sets_are_all_ways_to_break_the_ties(data: st.DataObject, scores: list[float], most: int) -> None:
    count = data.draw(st.integers(1, len(scores)))
    found, expected = [tuple(sorted(some)) for some in lowest_sets(scores, count)], lowest(scores, count)
    assert sorted(found) == expected
    few = [tuple(sorted(some)) for some in lowest_sets(scores, count, most)]
    assert few == found if len(expected) <= most else len(few) == most and set(few) <= set(expected)


def test_of_too_many_ways_to_break_a_tie_some_are_drawn_with_equal_chances() -> None:
    drawn = list(lowest_sets([0.0, *[1.0] * 20, 2.0], 11, 1000))
    share = [sum(i in some for some in drawn) / 1000 for i in range(22)]
    assert share[0] == 1 and share[21] == 0 and share[1:21] == pytest.approx([0.5] * 20, abs=0.08)
    assert all(len(set(some)) == 11 for some in drawn) and drawn == list(lowest_sets([0.0, *[1.0] * 20, 2.0], 11, 1000))


@settings(max_examples=15)
@given(seed=seeds, count=st.integers(1, 3), scores=ranks)
def test_where_all_sets_can_be_tried_the_best_is_the_best_and_regret_is_what_others_cost_more(
    architecture: Architecture, seed: int, count: int, scores: list[float]
) -> None:
    probe = study(architecture, seed)
    removals = Removals(probe)
    losses = {gone: loss_without(probe, gone) for gone in combinations(range(6), count)}
    best = min(losses, key=lambda gone: losses[gone])
    assert removals.exhaustive and {gone: removals.loss(gone) for gone in losses} == pytest.approx(losses, rel=1e-9)
    assert removals.lowest(count) == pytest.approx(losses[best], rel=1e-9)
    ways = lowest(scores, count)
    expected = sum(losses[gone] for gone in ways) / len(ways)
    assert removals.chosen(torch.tensor(scores), count) == pytest.approx(expected, rel=1e-9)
    assert removals.chosen(torch.zeros(6), count) == pytest.approx(sum(losses.values()) / comb(6, count), rel=1e-9)
    perfect = torch.tensor([float(e not in best) for e in range(6)])
    assert removals.chosen(perfect, count) == removals.lowest(count)
    assert removals.chosen(torch.tensor(scores), count) >= removals.lowest(count)


@pytest.mark.parametrize("siblings, stem", [(True, "mlp"), (False, "conv")])
@settings(max_examples=3)
@given(seed=seeds, scores=ranks)
def test_elsewhere_experts_are_removed_one_after_the_other(
    architecture: Architecture, siblings: bool, stem: str, seed: int, scores: list[float]
) -> None:
    probe = study(architecture, seed, siblings, stem=stem)
    gone: tuple[int, ...] = ()
    removals = Removals(probe)
    assert not removals.exhaustive
    for count in (1, 2, 3):
        ways = [(*gone, e) for e in range(6) if e not in gone]
        gone = min(ways, key=lambda some: loss_without(probe, some))
        assert removals.lowest(count) == pytest.approx(loss_without(probe, gone), rel=1e-9)
        perfect = torch.tensor([float(e not in gone) for e in range(6)])
        assert removals.chosen(perfect, count) == pytest.approx(removals.lowest(count), rel=1e-9)
    some = lowest(scores, 1)
    expected = sum(loss_without(probe, way) for way in some) / len(some)
    assert removals.chosen(torch.tensor(scores), 1) == pytest.approx(expected, rel=1e-9)
    pairs = [loss_without(probe, pair) for pair in combinations(range(6), 2)]
    assert removals.chosen(torch.zeros(6), 2) == pytest.approx(sum(pairs) / 15, rel=1e-9)


@pytest.mark.parametrize("siblings", [True, False])
def test_too_few_experts_can_not_be_left(architecture: Architecture, siblings: bool) -> None:
    removals = Removals(study(architecture, 0, siblings))
    assert [removals.lowest(count) < inf for count in (4, 5, 6, 7)] == [True, False, False, False]
    assert removals.chosen(torch.arange(6.0), 4) < removals.chosen(torch.arange(6.0), 5) == inf
