"""Surgery changes what it promises to change, to the bit, in the layer and in the optimizer that trains it."""

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from phasegate.model.moe import MoE
from phasegate.surgery.operations import ExpertManager, SurgeryRefused
from tests.layers import EXPERT, WIDTH, by_id, check_sizes, managers, operate, picks, plans, same, state, train, trained
from tests.models import seeds, siblings

MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}


def ids_run(moe: MoE, x: Tensor) -> Tensor:
    """Which experts tokens (N, D) run, by stable id."""
    return moe.expert_id[moe(x[None])[1].experts[0]]


def scaled(rows: dict[str, Tensor], share: float, *names: str) -> dict[str, Tensor]:
    """An expert's weights and moments, the moments of some tensors as of a gradient that is `share` times as large."""
    factors = {f"{name}.{moment}": share**power for name in names for moment, power in MOMENTS.items()}
    return {name: values * factors.get(name, 1) for name, values in rows.items()}


def rounding(y: Tensor) -> float:
    """The change that rounding may make."""
    return (1e-12 if y.dtype == torch.float64 else 1e-6) * float(y.detach().norm())


@settings(max_examples=40)
@given(managers(planned=False), plans)
def test_surgery_leaves_every_other_expert_and_its_moments_as_they_were(manager: Any, plan: Any) -> None:
    moe = manager.moe
    used = set(moe.expert_id.tolist())
    for operation, pick in plan:
        before, whole = by_id(manager), state(manager)
        family = dict(zip(moe.expert_id.tolist(), moe.family_of.tolist(), strict=True))
        try:
            surgery = operate(manager, operation, pick)
        except SurgeryRefused:
            assert same(whole, state(manager))
            assert operation == "merge" or (operation == "remove" and moe.n_families == moe.top_k)
            assert operation == "remove" or all(manager.sibling(expert) is None for expert in before)
            continue
        check_sizes(manager)
        after = by_id(manager)
        assert surgery.n_routed_before == len(before) and surgery.n_routed_after == len(after) == moe.n_routed
        assert set(moe.family_of.tolist()) == set(range(moe.n_families)) and moe.n_families >= moe.top_k
        untouched = before.keys() & after.keys()
        if operation in ("remove", "merge"):
            assert before.keys() - after.keys() == {surgery.expert}
            untouched -= {surgery.parent}
        else:
            assert after.keys() - before.keys() == {surgery.expert} and surgery.expert not in used
            used.add(surgery.expert)
            if surgery.parent is not None:
                before[surgery.parent] = scaled(before[surgery.parent], 0.5, *EXPERT)
                for expert in before if operation == "clone" else ():  # siblings share a router row
                    if family[expert] == family[surgery.parent]:
                        before[expert] = scaled(before[expert], 0.5, "router")
                assert same(after[surgery.expert], before[surgery.parent])
        assert all(same(before[expert], after[expert]) for expert in untouched)
        train(manager)


@settings(max_examples=40)
@given(managers(), picks)
def test_a_split_keeps_the_function_and_the_chosen_families(manager: Any, pick: int) -> None:
    moe = manager.moe
    x = torch.randn(1, 200, WIDTH, dtype=moe.w_in.dtype)
    y, routing = moe(x)
    surgery = operate(manager, "split", pick)
    y_after, routing_after = moe(x)
    assert torch.equal(y_after, y) if y.dtype == torch.float32 else (y_after - y).norm() <= rounding(y)
    assert torch.equal(routing.families, routing_after.families)
    positive = (x @ moe.node_weight[-1] + moe.node_offset[-1] > 0).unsqueeze(-1)  # these go to the new half
    ids, ids_after = moe.expert_id[routing.experts], moe.expert_id[routing_after.experts]
    assert torch.equal(torch.where((ids == surgery.parent) & positive, surgery.expert, ids), ids_after)


@settings(max_examples=40)
@given(managers(), picks, st.floats(0, 1), st.sampled_from(["scaled", "carried"]))
def test_merging_right_after_a_split_restores_every_bit(manager: Any, pick: int, share: float, moments: str) -> None:
    moe, manager.moments = manager.moe, moments
    x = torch.randn(1, 200, WIDTH, dtype=moe.w_in.dtype)
    y, before, ids = moe(x)[0], state(manager), ids_run(moe, x[0])
    surgery = operate(manager, "split", pick)
    assert surgery.parent is not None
    backwards = copy.deepcopy(manager)

    merger = manager.merge(surgery.expert, surgery.parent, share)
    assert (merger.expert, merger.parent) == (surgery.expert, surgery.parent)
    after = state(manager)
    for counter in ("load", "next_id"):
        del before[counter], after[counter]
    assert same(before, after)
    assert torch.equal(moe(x)[0], y)

    backwards.merge(surgery.parent, surgery.expert, share)
    check_sizes(backwards)
    assert (backwards.moe(x)[0] - y).norm() <= rounding(y)
    assert torch.equal(ids_run(backwards.moe, x[0]), torch.where(ids == surgery.parent, surgery.expert, ids))


@settings(max_examples=40)
@given(managers(), picks, st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_merging_gives_the_weighted_mean_and_moves_no_other_token(manager: Any, pick: int, share: float) -> None:
    moe = manager.moe
    surgery = operate(manager, "split", pick)
    for _ in range(5):
        train(manager)
    expert, into = (surgery.expert, surgery.parent) if pick % 2 else (surgery.parent, surgery.expert)
    assert expert is not None and into is not None
    x = torch.randn(200, WIDTH, dtype=moe.w_in.dtype)
    ids, before = ids_run(moe, x), by_id(manager)
    load = dict(zip(moe.expert_id.tolist(), moe.load.tolist(), strict=True))
    manager.merge(expert, into, share)
    after = by_id(manager)
    load[into] += load.pop(expert)
    assert dict(zip(moe.expert_id.tolist(), moe.load.tolist(), strict=True)) == load
    for name, rows in before[into].items():
        one, other = before[expert][name].double(), rows.double()
        wanted = share * one + (1 - share) * other
        if power := MOMENTS.get(name.split(".")[-1] if name.startswith(EXPERT) else ""):
            wanted = power * (one + other)
        most = 4 * torch.finfo(rows.dtype).eps * (one.abs() + other.abs())
        assert (after[into][name] - wanted).abs().le(most).all()
    if share in (0, 1):
        assert all(torch.equal(after[into][name], before[expert if share else into][name]) for name in EXPERT)
    assert torch.equal(ids_run(moe, x), torch.where(ids == expert, into, ids))


def test_thirty_nested_splits_keep_the_function() -> None:
    moe, manager = trained(0)
    x = torch.randn(1, 500, WIDTH)
    y = moe(x)[0]
    for _ in range(30):
        operate(manager, "split", moe.n_routed - 1)  # the half that was made last
    assert (moe.n_routed, moe.n_families, int(moe.path[-1].count_nonzero())) == (35, 5, 30)
    assert torch.equal(moe(x)[0], y)


@settings(max_examples=100)
@given(managers(planned=False, steps=1), st.lists(picks, max_size=8), picks)
def test_a_removal_changes_the_experts_of_its_own_tokens_only(manager: Any, splits: list[int], pick: int) -> None:
    moe = manager.moe
    moe.selection_bias.normal_()
    for split in splits:
        operate(manager, "split", split)
    x, e = torch.randn(200, WIDTH, dtype=moe.w_in.dtype), pick % moe.n_routed
    ids, removed, had_sibling = ids_run(moe, x), int(moe.expert_id[e]), bool(moe.path[e].any())
    try:
        manager.remove(removed)
    except SurgeryRefused:
        reject()
    others = (ids != removed).all(-1)
    assert torch.equal(ids_run(moe, x)[others], ids[others])
    assert not had_sibling or torch.equal(ids != ids_run(moe, x), ids == removed)


@settings(max_examples=50)
@given(seeds, st.integers(1, 6), plans)
def test_siblings_are_the_leaves_whose_paths_part_at_one_node_alone(seed: int, n_routed: int, plan: Any) -> None:
    moe, manager = trained(seed, n_routed, top_k=1, steps=0)
    for operation, pick in plan:
        with suppress(SurgeryRefused):
            operate(manager, operation, pick)
        known = moe.expert_id.tolist()
        pairs = {known[e]: known[other] for e, other in siblings(moe).items()}
        assert [manager.sibling(expert) for expert in known] == [pairs.get(expert) for expert in known]


@pytest.mark.parametrize(
    ("why", "refused"),
    [
        (r"expert 9 does not exist; the layer has \[0, 1, 2, 3, 4\]", lambda manager: manager.remove(9)),
        (r"expert -1 does not exist", lambda manager: manager.clone(-1)),
        (r"expert 5 does not exist", lambda manager: manager.split(5, torch.ones(8), 0.0)),
        (r"remove of expert 1: 3 families are left and top_k is 3", lambda manager: manager.remove(1)),
        (r"split of expert 1: the direction must be 8 finite", lambda manager: manager.split(1, torch.ones(7), 0.0)),
        (r"split of expert 1: the direction .* finite", lambda manager: manager.split(1, torch.ones(8) * torch.nan, 0)),
        (r"split of expert 1: .*offset.* finite", lambda manager: manager.split(1, torch.ones(8), float("nan"))),
        (r"split of expert 1: the share is 1.0\b", lambda manager: manager.split(1, torch.ones(8), 0.0, 1.0)),
        (r"split of expert 1: the share is 0\b", lambda manager: manager.split(1, torch.ones(8), 0.0, 0)),
        (r"clone of expert 1: the share is 0\b", lambda manager: manager.clone(1, 0)),
        (r"clone of expert 1: the share is nan\b", lambda manager: manager.clone(1, float("nan"))),
        (r"expert 7 does not exist", lambda manager: manager.merge(7, 0, 0.5)),
        (r"expert 7 does not exist", lambda manager: manager.merge(0, 7, 0.5)),
        (r"expert 7 does not exist", lambda manager: manager.sibling(7)),
        (r"merge of expert 1 into 2: they are not the two leaves", lambda manager: manager.merge(1, 2, 0.5)),
        (r"merge of expert 4 into 3: they are not the two leaves", lambda manager: manager.merge(4, 3, 0.5)),
        (r"merge of expert 3 into 0: they are not the two leaves", lambda manager: manager.merge(3, 0, 0.5)),
        (r"merge of expert 0 into 0: they are not the two leaves", lambda manager: manager.merge(0, 0, 0.5)),
        (r"merge of expert 4 into 0: the share is -0.1\b", lambda manager: manager.merge(4, 0, -0.1)),
        (r"merge of expert 0 into 4: the share is 1.01\b", lambda manager: manager.merge(0, 4, 1.01)),
        (r"merge of expert 4 into 0: the share is nan\b", lambda manager: manager.merge(4, 0, float("nan"))),
    ],
)
def test_a_refused_operation_says_why_and_changes_nothing(why: str, refused: Any) -> None:
    moe, manager = trained(0, n_routed=3, top_k=3)
    for _ in range(2):
        operate(manager, "split", 0)  # the tree of expert 0 is now ((0, 4), 3)
        train(manager)
    before, parameters, tables = state(manager), list(moe.parameters()), (moe._root.clone(), moe._child.clone())
    with pytest.raises(SurgeryRefused, match=why):
        refused(manager)
    assert same(before, state(manager))
    assert all(one is other for one, other in zip(parameters, moe.parameters(), strict=True))
    assert all(map(torch.equal, tables, (moe._root, moe._child)))


@pytest.mark.parametrize("operation", ["split", "merge", "remove", "clone", "reinit"])
def test_training_goes_on_while_a_graph_from_before_is_alive(operation: str) -> None:
    moe, manager = trained(0)
    operate(manager, "split", 0)
    train(manager)
    y, routing = moe(torch.randn(1, 64, WIDTH))
    operate(manager, operation, 1)
    before = state(manager)
    train(manager)
    y.sum().backward()
    assert routing.probs.requires_grad
    assert not torch.equal(before["w_in"], moe.w_in) and moe.w_in.isfinite().all()


def test_surgery_needs_no_optimizer_and_no_training() -> None:
    for manager in (ExpertManager(MoE(WIDTH, 5, 8, 2)), trained(0, steps=0)[1]):
        for operation in ("split", "split", "merge", "clone", "reinit", "remove"):
            operate(manager, operation, 0)
        assert manager.moe(torch.randn(1, 64, WIDTH))[0].isfinite().all()
