"""Surgery changes what it promises to change, to the bit, in the layer and in the optimizer that trains it."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import AdamW

from phasegate import expert_manager
from phasegate.expert_manager import ExpertManager, Surgery, SurgeryRefused, halving_plane
from phasegate.moe import AXES, MoE

EXPERT = ("w_in", "w_out")
ALL_AXES = dict(AXES)
seeds = st.integers(0, 10**6)


def trained(seed: int, n_routed: int = 5, top_k: int = 2, steps: int = 3, dtype: torch.dtype = torch.float32) -> Any:
    """A layer after some steps of the pipeline's optimizer, and its manager."""
    torch.manual_seed(seed)
    moe = MoE(8, n_routed, 8, top_k).to(dtype)
    manager = ExpertManager(moe, AdamW(moe.parameters(), lr=0.01, fused=True))
    for _ in range(steps):
        train(manager)
    return moe, manager


def train(manager: ExpertManager) -> None:
    """One step under a gradient that is noise, so that its size is the same at every step."""
    x, gradient = torch.randn(2, 1, 64, 8, dtype=manager.moe.w_in.dtype)
    assert manager.optimizer is not None
    manager.optimizer.zero_grad()
    manager.moe(x)[0].backward(gradient)
    manager.optimizer.step()


def operate(manager: ExpertManager, operation: str, pick: int) -> Surgery:
    """One operation on the pick-th expert; a split halves the tokens that the expert gets."""
    moe = manager.moe
    index = pick % moe.n_routed
    expert = int(moe.expert_id[index])
    if operation == "split":
        x = torch.randn(1, 100, 8, dtype=moe.w_in.dtype)
        tokens = x[0][(moe(x)[1].experts[0] == index).any(-1)]
        return manager.split(expert, *halving_plane(tokens, "principal", torch.Generator().manual_seed(pick)))
    if operation == "reinit":
        return manager.reinit(torch.Generator().manual_seed(pick))
    return manager.remove(expert) if operation == "remove" else manager.clone(expert)


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


def by_id(manager: ExpertManager) -> dict[int, list[Tensor]]:
    """Weights and moments of every expert, and its router row if it shares it with nobody."""
    now, experts = content(manager), {}
    for e, expert in enumerate(now["expert_id"].tolist()):
        rows = [value[e] for name, value in now.items() if name.startswith(EXPERT) and value.dim()]
        family = now["family_of"][e]
        rows += [value[:, family] for name, value in now.items() if name.startswith("router") and value.dim()]
        experts[expert] = rows
    return experts


def check_sizes(manager: ExpertManager) -> None:
    """Everything that counts the same thing agrees, and every optimizer state has its parameter's shape."""
    moe, sizes = manager.moe, dict[str | None, int]()
    for name, axes in ALL_AXES.items():
        for axis, size in zip(axes, getattr(moe, name).shape, strict=True):
            assert axis is None or sizes.setdefault(axis, size) == size, f"{name} has {size} rows of axis {axis}"
    assert manager.optimizer is not None
    owned = [parameter for group in manager.optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in owned} == {id(p) for p in moe.parameters()} >= {id(p) for p in manager.optimizer.state}
    for parameter, state in manager.optimizer.state.items():
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape


operations = st.lists(
    st.tuples(st.sampled_from(["split", "remove", "clone", "reinit"]), st.integers(0, 99)), max_size=20
)


@settings(max_examples=40)
@given(seeds, st.integers(3, 7), st.integers(1, 3), operations)
def test_surgery_leaves_every_other_expert_and_its_moments_bitwise_as_they_were(
    seed: int, n_routed: int, top_k: int, plan: list[tuple[str, int]]
) -> None:
    moe, manager = trained(seed, n_routed, top_k)
    used = set(moe.expert_id.tolist())
    for operation, pick in plan:
        before, whole = by_id(manager), content(manager)
        try:
            surgery = operate(manager, operation, pick)
        except SurgeryRefused:
            assert operation == "remove" and moe.n_families == top_k and same(whole, content(manager))
            continue
        check_sizes(manager)
        after = by_id(manager)
        assert moe.n_routed == surgery.n_routed_after == len(after)
        assert set(moe.family_of.tolist()) == set(range(moe.n_families)) and moe.n_families >= top_k
        if operation == "remove":
            assert before.keys() - after.keys() == {surgery.expert}
        else:
            assert after.keys() - before.keys() == {surgery.expert} and surgery.expert not in used
            used.add(surgery.expert)
            if surgery.parent is not None:
                assert all(map(torch.equal, after[surgery.expert], before[surgery.parent]))
        for expert in before.keys() & after.keys():
            assert all(map(torch.equal, before[expert], after[expert]))
        train(manager)


@settings(max_examples=30)
@given(seeds, st.integers(0, 99), operations.map(lambda plan: plan[:4]), st.booleans())
def test_a_split_keeps_the_function_and_the_chosen_families(
    seed: int, pick: int, plan: list[tuple[str, int]], double: bool
) -> None:
    dtype, bound = (torch.float64, 1e-12) if double else (torch.float32, 1e-6)
    moe, manager = trained(seed, 7, dtype=dtype)
    for operation, earlier in plan:
        operate(manager, operation, earlier)
    x = torch.randn(1, 200, 8, dtype=dtype)
    y, routing = moe(x)
    surgery = operate(manager, "split", pick)
    y_after, routing_after = moe(x)
    assert (y_after - y).norm() <= bound * y.norm()
    assert torch.equal(routing.families, routing_after.families)
    positive = (x @ moe.node_weight[-1] + moe.node_offset[-1] > 0).unsqueeze(-1)  # these go to the new half
    ids, ids_after = moe.expert_id[routing.experts], moe.expert_id[routing_after.experts]
    assert torch.equal(torch.where((ids == surgery.parent) & positive, surgery.expert, ids), ids_after)


def test_thirty_nested_splits_keep_the_function() -> None:
    moe, manager = trained(0)
    x = torch.randn(1, 500, 8)
    y = moe(x)[0]
    for _ in range(30):  # always the half that was made last
        operate(manager, "split", moe.n_routed - 1)
    assert moe.n_routed == 35 and moe.n_families == 5 and (moe.path != 0).sum(1).max() == 30
    assert (moe(x)[0] - y).norm() <= 1e-6 * y.norm()


@given(seeds, st.integers(1, 8), st.integers(0, 99))
def test_removing_a_leaf_with_a_sibling_changes_the_expert_of_its_own_tokens_only(
    seed: int, splits: int, pick: int
) -> None:
    moe, manager = trained(seed, steps=1)
    for split in range(splits):
        operate(manager, "split", pick * split)
    siblings = moe.expert_id[(moe.path != 0).any(1)].tolist()
    removed = siblings[pick % len(siblings)]
    x = torch.randn(1, 200, 8)
    ids = moe.expert_id[moe(x)[1].experts]
    manager.remove(removed)
    ids_after = moe.expert_id[moe(x)[1].experts]
    assert torch.equal(ids != ids_after, ids == removed)


@pytest.mark.parametrize(
    ("why", "refused"),
    [
        (r"expert 9 does not exist; the layer has \[0, 1, 2\]", lambda manager: manager.remove(9)),
        (r"expert -1 does not exist", lambda manager: manager.clone(-1)),
        (r"expert 3 does not exist", lambda manager: manager.split(3, torch.ones(8), 0.0)),
        (r"remove of expert 1: 3 families are left and top_k is 3", lambda manager: manager.remove(1)),
        (r"split of expert 1: the direction must be 8 finite", lambda manager: manager.split(1, torch.ones(7), 0.0)),
        (r"split of expert 1: the direction .* finite", lambda manager: manager.split(1, torch.ones(8) * torch.nan, 0)),
        (r"split of expert 1: .*offset.* finite", lambda manager: manager.split(1, torch.ones(8), float("nan"))),
    ],
)
def test_a_refused_operation_says_why_and_changes_nothing(why: str, refused: Any) -> None:
    moe, manager = trained(0, n_routed=3, top_k=3)
    before, parameters = content(manager), list(moe.parameters())
    with pytest.raises(SurgeryRefused, match=why):
        refused(manager)
    assert same(before, content(manager))
    assert all(one is other for one, other in zip(parameters, moe.parameters(), strict=True))


@pytest.mark.parametrize("operation", ["split", "remove", "clone", "reinit"])
def test_training_goes_on_while_a_graph_from_before_is_alive(operation: str) -> None:
    moe, manager = trained(0)
    y, routing = moe(torch.randn(1, 64, 8))
    operate(manager, operation, 1)
    before = content(manager)
    train(manager)
    y.sum().backward()
    assert routing.probs.requires_grad
    assert not torch.equal(before["w_in"], moe.w_in) and moe.w_in.isfinite().all()


def first_update(manager: ExpertManager, name: str) -> tuple[float, float]:
    """RMS of the next update in units of the learning rate: of the last row of a tensor, and of the experts of old."""
    before = {tensor: getattr(manager.moe, tensor).detach().clone() for tensor in (name, "w_out")}
    train(manager)
    update = {tensor: (getattr(manager.moe, tensor).detach() - before[tensor]) / 0.01 for tensor in before}
    fresh, untouched = update[name][-1], update["w_out"][1:5]
    return fresh.square().mean().sqrt().item(), untouched.square().mean().sqrt().item()


def after_many_steps(manager: ExpertManager) -> AdamW:
    """The optimizer, as if it had gone on so for long."""
    assert isinstance(manager.optimizer, AdamW)
    for state in manager.optimizer.state.values():
        state["step"].fill_(10_000.0)
    return manager.optimizer


@pytest.mark.parametrize("seed", range(3))
def test_the_first_update_of_fresh_rows_is_ordinary_where_zeroed_moments_would_make_it_a_jump(seed: int) -> None:
    moe, manager = trained(seed, steps=200)
    optimizer = after_many_steps(manager)
    operate(manager, "reinit", seed)
    fresh, untouched = first_update(manager, "w_out")
    assert 0 < fresh <= 1.2 * untouched
    operate(manager, "reinit", seed)
    optimizer.state[moe.w_out]["exp_avg_sq"][-1] = 0
    fresh, untouched = first_update(manager, "w_out")
    assert 2.8 < fresh < 3.2 and untouched < 1


def test_the_first_update_of_a_hyperplane_is_ordinary_where_another_has_gone() -> None:
    _, manager = trained(0)
    surgery = operate(manager, "split", 0)
    for _ in range(100):
        train(manager)
    after_many_steps(manager)
    manager.remove(surgery.expert)
    operate(manager, "split", 0)
    fresh, _ = first_update(manager, "node_weight")
    assert 0 < fresh <= 1.2


@pytest.mark.parametrize("forgotten", AXES)
def test_a_tensor_left_out_of_the_axes_is_noticed(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moe, manager = trained(0)
    longer = {"expert": [*range(5), 0], "family": [*range(5), 0], "node": [-1], "gate": [0, 0]}
    expert_manager.rebuild(moe, manager.optimizer, longer)
    check_sizes(manager)
    moe, manager = trained(0)
    monkeypatch.delitem(AXES, forgotten)
    expert_manager.rebuild(moe, manager.optimizer, longer)
    with pytest.raises(AssertionError, match="rows of axis"):
        check_sizes(manager)


@given(seeds, st.integers(0, 41), st.sampled_from(["principal", "random"]), st.booleans())
def test_a_halving_plane_halves_tokens(seed: int, count: int, direction: Any, ties: bool) -> None:
    torch.manual_seed(seed)
    tokens = torch.randn(count, 8)
    if ties:
        tokens = tokens[:1].expand(count, -1)
    normal, offset = halving_plane(tokens, direction, torch.Generator().manual_seed(seed))
    margins = (tokens.double() @ normal.double() + offset).tolist()
    torch.testing.assert_close(normal.norm(), torch.ones(()))
    if ties or count < 2:
        assert all(abs(margin) < 1e-5 for margin in margins)
    else:
        assert sum(margin > 1e-6 for margin in margins) == sum(margin < -1e-6 for margin in margins) == count // 2
