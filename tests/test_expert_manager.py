"""Surgery changes what it promises to change, to the bit, in the layer and in the optimizer that trains it."""

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from phasegate import expert_manager
from phasegate.expert_manager import ExpertManager, Surgery, SurgeryRefused, carry_state
from phasegate.hyperplanes import halve, principal_direction
from phasegate.moe import AXES, MoE

WIDTH = 8
RATE = 0.01
EXPERT = ("w_in", "w_out")
ALL_AXES = dict(AXES)
seeds = st.integers(0, 10**6)
picks = st.integers(0, 99)
steps = st.tuples(st.sampled_from(["split", "merge", "remove", "clone", "reinit"]), picks)
plans = st.integers(0, 20).flatmap(lambda length: st.lists(steps, min_size=length, max_size=length))


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    """A seed and sizes, for `trained`."""
    n_routed = draw(st.integers(2, 32))
    sizes = {"top_k": st.integers(1, min(n_routed, 4)), "n_shared": st.integers(0, 2), "seed": seeds}
    return {"n_routed": n_routed} | {name: draw(size) for name, size in sizes.items()}


def trained(
    seed: int,
    n_routed: int = 5,
    top_k: int = 2,
    n_shared: int = 0,
    steps: int = 3,
    dtype: torch.dtype = torch.float32,
    hyperplanes: bool = True,
) -> Any:
    """A layer after some steps of the pipeline's optimizer, and its manager."""
    torch.manual_seed(seed)
    moe = MoE(WIDTH, n_routed, 8, top_k, n_shared).to(dtype)
    for hyperplane in (moe.node_weight, moe.node_offset):
        hyperplane.requires_grad_(hyperplanes)
    manager = ExpertManager(moe, AdamW(moe.parameters(), lr=RATE, fused=True))
    for _ in range(steps):
        train(manager)
    return moe, manager


def train(manager: ExpertManager) -> None:
    """One step under a gradient that is noise, so that its size is the same at every step."""
    x, gradient = torch.randn(2, 1, 64, WIDTH, dtype=manager.moe.w_in.dtype)
    step(manager, (manager.moe(x)[0] * gradient).sum())


def classify(manager: ExpertManager) -> None:
    """One step towards telling overlapping classes apart: the layer's outputs are the logits."""
    means = torch.randn(2 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    y = torch.randint(len(means), (128,))  # each class has two means
    x = means[y] + 0.8 * torch.randn(len(y), WIDTH)
    step(manager, F.cross_entropy(manager.moe(x[None])[0][0], y % WIDTH))


def step(manager: ExpertManager, loss: Tensor) -> None:
    assert manager.optimizer is not None
    manager.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    manager.optimizer.step()


def operate(manager: ExpertManager, operation: str, pick: int) -> Surgery:
    """One operation on the pick-th expert that may suit; a split halves the tokens that the expert gets."""
    moe = manager.moe
    index = pick % moe.n_routed
    expert = int(moe.expert_id[index])
    if operation == "split":
        x = torch.randn(1, 100, WIDTH, dtype=moe.w_in.dtype)
        tokens = x[0][(moe(x)[1].experts[0] == index).any(-1)]
        return manager.split(expert, *halve(tokens, principal_direction(tokens)))
    if operation == "merge":
        pairs = [(e, s) for e in moe.expert_id.tolist() if (s := manager.sibling(e)) is not None]
        one, other = pairs[pick % len(pairs)] if pairs else (expert, expert)
        return manager.merge(one, other, share=pick / 99)
    if operation == "reinit":
        return manager.reinit(torch.Generator().manual_seed(pick))
    return manager.remove(expert) if operation == "remove" else manager.clone(expert)


def follow(manager: ExpertManager, plan: list[tuple[str, int]]) -> None:
    """All that the layer allows of a plan, with training in between."""
    for operation, pick in plan:
        try:
            operate(manager, operation, pick)
        except SurgeryRefused:
            continue
        train(manager)


def content(manager: ExpertManager) -> dict[str, Tensor]:
    """Every number of the layer and of its optimizer, by name."""
    assert manager.optimizer is not None
    named = dict(manager.moe.state_dict())
    for name, parameter in manager.moe.named_parameters():
        state = manager.optimizer.state.get(parameter, {})
        named |= {f"{name}.{key}": value for key, value in state.items()}
    return {name: value.clone() for name, value in named.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows_of(named: dict[str, Tensor], e: int) -> dict[str, Tensor]:
    """Weights and moments of one expert index."""
    return {name: value[e] for name, value in named.items() if name.startswith(EXPERT) and value.dim()}


def by_id(manager: ExpertManager) -> dict[int, dict[str, Tensor]]:
    """Weights and moments of every expert, and its router row."""
    now, experts = content(manager), {}
    for e, expert in enumerate(now["expert_id"].tolist()):
        family = now["family_of"][e]
        router = {name: v[:, family] for name, v in now.items() if name.startswith("router") and v.dim()}
        experts[expert] = rows_of(now, e) | router
    return experts


def ids_run(moe: MoE, x: Tensor) -> Tensor:
    """Which experts tokens (N, D) run, by stable id."""
    return moe.expert_id[moe(x[None])[1].experts[0]]


def loads(moe: MoE) -> dict[int, int]:
    return dict(zip(moe.expert_id.tolist(), moe.load.tolist(), strict=True))


def check_sizes(manager: ExpertManager) -> None:
    """Everything that counts the same thing agrees, and every trained parameter has moments of its own shape."""
    moe, sizes = manager.moe, dict[str | None, int]()
    for name, axes in ALL_AXES.items():
        for axis, size in zip(axes, getattr(moe, name).shape, strict=True):
            assert axis is None or sizes.setdefault(axis, size) == size, f"{name} has {size} rows of axis {axis}"
    assert moe.n_routed == sizes["expert"] and moe.n_families == sizes["family"]
    assert manager.optimizer is not None
    owned = [parameter for group in manager.optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in owned} == {id(p) for p in moe.parameters()}
    for name, parameter in moe.named_parameters():
        state = manager.optimizer.state.get(parameter)
        assert (state is not None) == (parameter.requires_grad and len(parameter) > 0), f"moments of {name}"
        if state is not None:
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape, f"moments of {name}"
    assert {id(p) for p in manager.optimizer.state} <= {id(p) for p in owned}


@settings(max_examples=40)
@given(layers(), plans, st.booleans())
def test_surgery_leaves_every_other_expert_and_its_moments_bitwise_as_they_were(
    layer: dict[str, Any], plan: list[tuple[str, int]], hyperplanes: bool
) -> None:
    moe, manager = trained(**layer, hyperplanes=hyperplanes)
    used = set(moe.expert_id.tolist())
    for operation, pick in plan:
        before, whole = by_id(manager), content(manager)
        try:
            surgery = operate(manager, operation, pick)
        except SurgeryRefused:
            assert same(whole, content(manager))
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
                assert same(after[surgery.expert], before[surgery.parent])
        assert all(same(before[expert], after[expert]) for expert in untouched)
        train(manager)


@settings(max_examples=40)
@given(layers(), plans, picks, st.booleans())
def test_a_split_keeps_the_function_and_the_chosen_families(
    layer: dict[str, Any], plan: list[tuple[str, int]], pick: int, double: bool
) -> None:
    dtype, bound = (torch.float64, 1e-12) if double else (torch.float32, 1e-6)
    moe, manager = trained(**layer, dtype=dtype)
    follow(manager, plan)
    x = torch.randn(1, 200, WIDTH, dtype=dtype)
    y, routing = moe(x)
    surgery = operate(manager, "split", pick)
    y_after, routing_after = moe(x)
    assert (y_after - y).norm() <= bound * y.norm()
    assert torch.equal(routing.families, routing_after.families)
    positive = (x @ moe.node_weight[-1] + moe.node_offset[-1] > 0).unsqueeze(-1)  # these go to the new half
    ids, ids_after = moe.expert_id[routing.experts], moe.expert_id[routing_after.experts]
    assert torch.equal(torch.where((ids == surgery.parent) & positive, surgery.expert, ids), ids_after)


@settings(max_examples=40)
@given(layers(), plans, picks, st.floats(0, 1), st.booleans(), st.booleans())
def test_merging_right_after_a_split_restores_the_layer_to_the_bit(
    layer: dict[str, Any], plan: list[tuple[str, int]], pick: int, share: float, double: bool, hyperplanes: bool
) -> None:
    dtype, bound = (torch.float64, 1e-12) if double else (torch.float32, 1e-6)
    moe, manager = trained(**layer, dtype=dtype, hyperplanes=hyperplanes)
    follow(manager, plan)
    x = torch.randn(1, 200, WIDTH, dtype=dtype)
    y, before, ids = moe(x)[0], content(manager), ids_run(moe, x[0])
    surgery = operate(manager, "split", pick)
    assert surgery.parent is not None
    backwards = copy.deepcopy(manager)

    merger = manager.merge(surgery.expert, surgery.parent, share)
    assert (merger.expert, merger.parent) == (surgery.expert, surgery.parent)
    after = content(manager)
    for counter in ("load", "next_id"):
        del before[counter], after[counter]
    assert same(before, after)
    assert torch.equal(moe(x)[0], y)

    backwards.merge(surgery.parent, surgery.expert, share)
    check_sizes(backwards)
    assert (backwards.moe(x)[0] - y).norm() <= bound * y.norm()
    renamed = torch.where(ids == surgery.parent, surgery.expert, ids)
    assert torch.equal(ids_run(backwards.moe, x[0]), renamed)


@settings(max_examples=40)
@given(layers(), plans, picks, st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.booleans())
def test_merging_halves_that_differ_gives_their_weighted_mean_and_moves_no_other_token(
    layer: dict[str, Any], plan: list[tuple[str, int]], pick: int, share: float, double: bool
) -> None:
    moe, manager = trained(**layer, dtype=torch.float64 if double else torch.float32)
    follow(manager, plan)
    surgery = operate(manager, "split", pick)
    for _ in range(5):
        train(manager)
    expert, into = (surgery.expert, surgery.parent) if pick % 2 else (surgery.parent, surgery.expert)
    assert expert is not None and into is not None
    x = torch.randn(200, WIDTH, dtype=moe.w_in.dtype)
    ids, before, load = ids_run(moe, x), by_id(manager), loads(moe)
    manager.merge(expert, into, share)
    after = by_id(manager)
    load[into] += load.pop(expert)
    assert loads(moe) == load
    for name, rows in before[into].items():
        one, other = before[expert][name].double(), rows.double()
        rounding = 4 * torch.finfo(rows.dtype).eps * (one.abs() + other.abs())
        assert (after[into][name] - (share * one + (1 - share) * other)).abs().le(rounding).all()
    assert share not in (0, 1) or same(after[into], before[expert if share else into])
    assert torch.equal(ids_run(moe, x), torch.where(ids == expert, into, ids))


@pytest.mark.parametrize("seed", range(3))
def test_thirty_splits_of_any_experts_keep_the_function_where_clones_do_not(seed: int) -> None:
    x = torch.randn(1, 500, WIDTH, generator=torch.Generator().manual_seed(seed))
    change = {}
    for operation in ("split", "clone"):
        moe, manager = trained(seed)
        y = moe(x)[0]
        for _ in range(30):
            operate(manager, operation, int(torch.randint(moe.n_routed, ())))
        assert moe.n_routed == 35
        change[operation] = ((moe(x)[0] - y).norm() / y.norm()).item()
        assert operation == "clone" or (moe.n_families == 5 and (moe.path != 0).sum(1).max() > 3)
    assert change["split"] <= 1e-6 and change["clone"] > 1e-2


def test_thirty_nested_splits_keep_the_function() -> None:
    moe, manager = trained(0)
    x = torch.randn(1, 500, WIDTH)
    y = moe(x)[0]
    for _ in range(30):  # always the half that was made last
        operate(manager, "split", moe.n_routed - 1)
    assert moe.n_routed == 35 and moe.n_families == 5 and (moe.path != 0).sum(1).max() == 30
    assert (moe(x)[0] - y).norm() <= 1e-6 * y.norm()


@settings(max_examples=50)
@given(layers(), st.lists(picks, min_size=1, max_size=8), picks)
def test_removing_a_leaf_with_a_sibling_changes_the_expert_of_its_own_tokens_only(
    layer: dict[str, Any], splits: list[int], pick: int
) -> None:
    moe, manager = trained(**layer, steps=1)
    for split in splits:
        operate(manager, "split", split)
    siblings = moe.expert_id[(moe.path != 0).any(1)].tolist()
    removed = siblings[pick % len(siblings)]
    x = torch.randn(200, WIDTH)
    ids = ids_run(moe, x)
    manager.remove(removed)
    assert torch.equal(ids != ids_run(moe, x), ids == removed)


@given(seeds, st.integers(1, 3), st.lists(picks, max_size=3), picks)
def test_removing_any_expert_leaves_tokens_that_did_not_run_it_alone_whatever_balances_the_selection(
    seed: int, top_k: int, splits: list[int], pick: int
) -> None:
    moe, manager = trained(seed, n_routed=6, top_k=top_k, steps=1)
    moe.selection_bias.normal_()
    for split in splits:
        operate(manager, "split", split)
    x = torch.randn(200, WIDTH)
    ids, removed = ids_run(moe, x), int(moe.expert_id[pick % moe.n_routed])
    manager.remove(removed)
    others = (ids != removed).all(-1)
    assert torch.equal(ids_run(moe, x)[others], ids[others])


Tree = int | tuple["Tree", "Tree"]


def replaced(tree: Tree, old: Tree, new: Tree) -> Tree:
    if tree == old:
        return new
    return tree if isinstance(tree, int) else (replaced(tree[0], old, new), replaced(tree[1], old, new))


def pairs_in(tree: Tree) -> list[tuple[Tree, Tree]]:
    return [] if isinstance(tree, int) else [tree, tree[::-1], *pairs_in(tree[0]), *pairs_in(tree[1])]


@settings(max_examples=50)
@given(seeds, st.integers(1, 6), plans)
def test_siblings_are_the_pairs_of_leaves_in_the_tree(seed: int, n_routed: int, plan: list[tuple[str, int]]) -> None:
    moe, manager = trained(seed, n_routed, top_k=1, steps=0)
    trees: list[Tree] = list(range(n_routed))
    for operation, pick in plan:
        try:
            surgery = operate(manager, operation, pick)
        except SurgeryRefused:
            continue
        expert, parent = surgery.expert, surgery.parent
        if operation == "split":
            assert parent is not None
            trees = [replaced(tree, parent, (parent, expert)) for tree in trees]
        elif operation in ("clone", "reinit"):
            trees.append(expert)
        else:
            for pair in [pair for tree in trees for pair in pairs_in(tree) if pair[0] == expert]:
                trees = [replaced(replaced(tree, pair, pair[1]), pair[::-1], pair[1]) for tree in trees]
            trees = [tree for tree in trees if tree != expert]
        siblings = {pair[0]: pair[1] for tree in trees for pair in pairs_in(tree)}
        for known in moe.expert_id.tolist():
            expected = siblings.get(known)
            assert manager.sibling(known) == (expected if isinstance(expected, int) else None)


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
    before, parameters, tables = content(manager), list(moe.parameters()), (moe._root.clone(), moe._child.clone())
    with pytest.raises(SurgeryRefused, match=why):
        refused(manager)
    assert same(before, content(manager))
    assert all(one is other for one, other in zip(parameters, moe.parameters(), strict=True))
    assert all(map(torch.equal, tables, (moe._root, moe._child)))


@pytest.mark.parametrize("operation", ["split", "merge", "remove", "clone", "reinit"])
def test_training_goes_on_while_a_graph_from_before_is_alive(operation: str) -> None:
    moe, manager = trained(0)
    operate(manager, "split", 0)
    train(manager)
    y, routing = moe(torch.randn(1, 64, WIDTH))
    operate(manager, operation, 1)
    before = content(manager)
    train(manager)
    y.sum().backward()
    assert routing.probs.requires_grad
    assert not torch.equal(before["w_in"], moe.w_in) and moe.w_in.isfinite().all()


@settings(max_examples=40)
@given(layers(), plans, st.booleans())
def test_both_halves_and_a_trained_hyperplane_learn_from_the_very_next_step(
    layer: dict[str, Any], plan: list[tuple[str, int]], hyperplanes: bool
) -> None:
    moe, manager = trained(**layer, hyperplanes=hyperplanes)
    follow(manager, plan)
    x = torch.randn(400, WIDTH)
    busiest = int(moe(x[None])[1].experts.flatten().mode().values)
    tokens = x[(moe(x[None])[1].experts[0] == busiest).any(-1)]
    manager.split(int(moe.expert_id[busiest]), *halve(tokens, principal_direction(tokens)))
    manager.optimizer.zero_grad()
    (moe(x[None])[0] * torch.randn(400, WIDTH)).sum().backward()
    for half in (busiest, -1):
        assert moe.w_in.grad[half].any() and moe.w_out.grad[half].any()
    for hyperplane in (moe.node_weight, moe.node_offset):
        assert hyperplane.requires_grad == hyperplanes
        assert hyperplane.grad[-1].any() if hyperplanes else hyperplane.grad is None


OBJECTIVES = {"noise": train, "classification": classify}
LONG = 10_000


@cache
def practised(objective: str, seed: int, halves: bool) -> ExpertManager:
    """A layer, `halves` if every expert was split once, as if it had been trained so for long; to be copied."""
    manager: ExpertManager = trained(seed, steps=0)[1]
    for _ in range(200):
        OBJECTIVES[objective](manager)
    for pick in range(5 * halves):
        operate(manager, "split", pick)
    for _ in range(200 * halves):
        OBJECTIVES[objective](manager)
    assert isinstance(manager.optimizer, AdamW)
    for state in manager.optimizer.state.values():
        for moment, beta in zip(("exp_avg", "exp_avg_sq"), manager.optimizer.defaults["betas"], strict=True):
            state[moment] /= 1 - beta ** state["step"]
        state["step"].fill_(LONG)
    return manager


def next_update(manager: ExpertManager, objective: str) -> dict[str, Tensor]:
    """Mean square of the next update of each expert, family and node, in units of the learning rate."""
    before = {name: parameter.detach().clone() for name, parameter in manager.moe.named_parameters()}
    OBJECTIVES[objective](manager)
    update = {name: (p.detach() - before[name]) / RATE for name, p in manager.moe.named_parameters()}
    update["router"] = update["router"][0]
    return {
        name: rows.square().flatten(1).mean(1) if rows.dim() > 1 else rows.square() for name, rows in update.items()
    }


def first_updates(
    objective: str, operation: str, seed: int, halves: bool, spoil: Callable[[ExpertManager], None] | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """RMS of the first update after an operation, of new rows and of untouched ones; on each expert in turn, twice."""
    new, untouched = defaultdict[str, list[Tensor]](list), defaultdict[str, list[Tensor]](list)
    original = practised(objective, seed, halves)
    torch.manual_seed(seed)
    for pick in range(40, 40 + 2 * original.moe.n_routed):
        manager = copy.deepcopy(original)
        surgery, moe = operate(manager, operation, pick), manager.moe
        if spoil:
            spoil(manager)
        update, ids = next_update(manager, objective), moe.expert_id.tolist()
        involved = [ids.index(expert) for expert in (surgery.expert, surgery.parent) if expert in ids]
        others = [e for e, family in enumerate(moe.family_of) if family not in moe.family_of[involved]]
        for name in EXPERT:
            new[name].append(update[name][involved[:1] if operation == "clone" else involved])
            untouched[name].append(update[name][others])
        untouched["router"].append(update["router"][moe.family_of[others]])
        for name in {"split": ("node_weight", "node_offset"), "merge": ()}.get(operation, ("router",)):
            new[name].append(update[name][-1:])
    rms = [{name: torch.cat(rows).mean().sqrt().item() for name, rows in kind.items()} for kind in (new, untouched)]
    return rms[0], rms[1]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("operation", "halves"),
    [("split", False), ("split", True), ("clone", False), ("reinit", False), ("merge", True)],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_first_update_after_surgery_is_an_ordinary_one(
    objective: str, operation: str, halves: bool, seed: int
) -> None:
    new, untouched = first_updates(objective, operation, seed, halves)
    for name, size in new.items():
        assert 0 < size <= 1.2 * untouched.get(name, untouched["router"]), name


SPOILABLE = [("reinit", "w_in"), ("reinit", "w_out"), ("split", "node_weight"), ("split", "node_offset")]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("operation", "name"), SPOILABLE)
def test_zeroed_moments_would_make_the_first_update_three_times_the_learning_rate(
    objective: str, operation: str, name: str
) -> None:
    def zeroed(manager: ExpertManager) -> None:
        assert manager.optimizer is not None
        manager.optimizer.state[getattr(manager.moe, name)]["exp_avg_sq"][-1] = 0

    new, untouched = first_updates(objective, operation, 0, False, zeroed)
    assert 3 < new[name] < 3.3 and untouched["router"] < 0.5


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["node_weight", "node_offset"])
def test_a_step_count_of_its_own_would_make_the_first_update_of_a_hyperplane_the_learning_rate(
    objective: str, name: str
) -> None:
    def unprimed(manager: ExpertManager) -> None:
        assert manager.optimizer is not None
        del manager.optimizer.state[getattr(manager.moe, name)]

    new, untouched = first_updates(objective, "split", 0, False, unprimed)
    assert new[name] == pytest.approx(1, abs=0.01) and new[name] > 2 * untouched["router"]


def test_the_first_update_of_a_hyperplane_is_ordinary_where_another_has_gone() -> None:
    manager = copy.deepcopy(practised("noise", 0, False))
    surgery = operate(manager, "split", 0)
    train(manager)
    manager.remove(surgery.expert)
    operate(manager, "split", 1)
    assert manager.optimizer is not None
    assert manager.optimizer.state[manager.moe.node_weight]["step"] > LONG
    update = next_update(manager, "noise")
    for name in ("node_weight", "node_offset"):
        assert 0 < update[name][-1] <= 1.2**2 * update["router"].mean()


@settings(max_examples=40)
@given(layers(), plans, picks)
def test_a_trained_hyperplane_starts_with_the_second_moment_of_its_familys_router_row(
    layer: dict[str, Any], plan: list[tuple[str, int]], pick: int
) -> None:
    moe, manager = trained(**layer)
    follow(manager, plan)
    surgery = operate(manager, "split", pick)
    family = moe.family_of[moe.expert_id == surgery.expert].item()
    row = manager.optimizer.state[moe.router]["exp_avg_sq"][0, family]
    weight, offset = (manager.optimizer.state[hyperplane] for hyperplane in (moe.node_weight, moe.node_offset))
    assert torch.equal(weight["exp_avg_sq"][-1], row) and torch.equal(offset["exp_avg_sq"][-1], row.mean())
    assert not weight["exp_avg"][-1].any() and not offset["exp_avg"][-1].any()


def test_surgery_needs_no_optimizer_and_no_training() -> None:
    for manager in (ExpertManager(MoE(WIDTH, 5, 8, 2)), trained(0, steps=0)[1]):
        for operation in ("split", "split", "merge", "clone", "reinit", "remove"):
            operate(manager, operation, 0)
        assert manager.moe(torch.randn(1, 64, WIDTH))[0].isfinite().all()


LONGER = {"expert": [*range(6), 0], "family": [*range(5), 0], "node": [0, -1], "gate": [0, 0]}


def split_once() -> tuple[MoE, ExpertManager]:
    moe, manager = trained(0)
    operate(manager, "split", 0)
    train(manager)
    return moe, manager


@pytest.mark.parametrize("forgotten", AXES)
def test_a_tensor_left_out_of_the_axes_is_noticed(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, manager = split_once()
    expert_manager.rebuild(moe, manager.optimizer, LONGER)
    check_sizes(manager)
    moe, manager = split_once()
    monkeypatch.delitem(AXES, forgotten)
    expert_manager.rebuild(moe, manager.optimizer, LONGER)
    with pytest.raises(AssertionError, match="rows of axis"):
        check_sizes(manager)


@pytest.mark.parametrize("forgotten", ["w_in", "w_out", "router", "node_weight", "node_offset"])
@pytest.mark.parametrize("lost", [False, True])
def test_moments_left_out_are_noticed(forgotten: str, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, manager = split_once()

    def forgetful(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, sources: dict[int, list[int]]) -> None:
        moments = dict(optimizer.state[old])
        carry_state(optimizer, old, new, sources)
        if old is getattr(moe, forgotten):
            del optimizer.state[new]
            if not lost:
                optimizer.state[new] = moments

    monkeypatch.setattr(expert_manager, "carry_state", forgetful)
    expert_manager.rebuild(moe, manager.optimizer, LONGER)
    with pytest.raises(AssertionError, match=f"moments of {forgotten}"):
        check_sizes(manager)
