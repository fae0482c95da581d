"""A birth changes no bit of what a model puts out, then newborns take over by the formulas; and upcycling and dying."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phasegate.model.births import Birth
from phasegate.model.classifier import Model, ModelSpec
from phasegate.model.moe import MoE
from phasegate.params.fields import override
from phasegate.params.phases import BIRTH_STEPS
from phasegate.surgery.operations import ExpertManager, SurgeryRefused, grow_older, kill
from phasegate.surgery.tasks import add_tasks
from phasegate.training.loop import make_optimizer
from tests.layers import EXPERT, WIDTH, by_id, check_sizes, managers, operate, picks, same, state, train, trained
from tests.models import ARCHITECTURE, cases, draws, seeds
from tests.tiny_data import TRAINING

N = 60  # tokens
ways = st.booleans()  # whether the old experts retire
kinds = st.fixed_dictionaries({"top_k": st.integers(1, 4), "n_shared": st.integers(0, 1), "n_gates": st.integers(1, 2)})


def rough(moe: MoE, splits: int = 3) -> MoE:
    """Give a layer families of several different experts, and a selection bias."""
    for pick in range(splits):
        operate(ExpertManager(moe), "split", pick)
    moe.selection_bias.normal_()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return moe


def halfway(seed: int, retires: bool, age: int, **kind: int) -> MoE:
    """A layer with a birth under way, in float32; its newborns put something out, and some have been split."""
    torch.manual_seed(seed)
    moe = rough(MoE(WIDTH, 5, 8, **kind))
    ExpertManager(moe).birth(6, retires, draws(seed))
    torch.nn.init.normal_(moe.w_out)
    moe.load.zero_()
    for _ in range(age):
        grow_older(moe, None)
    return moe


@torch.no_grad()
def reference(moe: MoE, x: Tensor, age: int) -> Tensor:
    """What growth.md says that a layer puts out at this age of its birth, token by token, in float64."""
    n_old, _, retires = moe.birth.tolist()
    k, c, y = moe.top_k, age / BIRTH_STEPS, torch.zeros_like(x)

    def chosen(g: int, token: Tensor, families: range) -> list[tuple[int, Tensor]]:
        scores = {f: moe.router[g, f] @ token for f in families}
        ranked = sorted(families, key=lambda f: -float(scores[f] + moe.selection_bias[g, f]))[:k]
        total = sum(scores[f].exp() for f in (ranked if k > 1 else families))
        return [(f, scores[f].exp() / total) for f in ranked]

    def run(family: int, token: Tensor) -> Tensor:
        sides = torch.where(moe.node_weight @ token + moe.node_offset > 0, 1, -1)
        leaves = (moe.family_of == family) & ((moe.path == sides) | (moe.path == 0)).all(1)
        (e,) = leaves.nonzero().flatten().tolist()
        return (token @ moe.w_in[e]).relu() @ moe.w_out[e]

    for g, tokens in enumerate(x):
        for n, token in enumerate(tokens):
            parts = []
            before = chosen(g, token, range(n_old))
            if retires:
                passed = k * age / BIRTH_STEPS
                after = chosen(g, token, range(n_old, moe.n_families))
                parts += [(f, gate * min(max(k - passed - i, 0), 1)) for i, (f, gate) in enumerate(before)]
                parts += [(f, gate) for i, (f, gate) in enumerate(after) if i < k * age // BIRTH_STEPS]
            else:
                parts += [(f, gate * (1 - c)) for f, gate in before]
                parts += [(f, gate * (c if f < n_old else 1)) for f, gate in chosen(g, token, range(moe.n_families))]
            y[g, n] = sum(gate * run(f, token) for f, gate in parts)
            if moe.n_shared:
                y[g, n] += (token @ moe.shared_in).relu() @ moe.shared_out
    return y


@settings(max_examples=40)
@given(seeds, cases, ways, st.integers(0, 5))
def test_a_birth_changes_no_bit_of_what_a_model_puts_out(seed: int, case: Any, retires: bool, more: int) -> None:
    torch.manual_seed(seed)
    model = Model(ModelSpec(override(ARCHITECTURE, case, ""), (1, 8), (4,)))
    add_tasks(model, make_optimizer(model.parameters(), TRAINING), [3], own_gates=True)
    x = torch.randn(20, 1, 8)
    for moe in model.layers:
        for pick in range(3):
            ExpertManager(moe).split(pick, torch.randn(16), 0.1)
        moe.selection_bias.normal_()
        torch.nn.init.normal_(moe.w_out)

    def outputs() -> list[Tensor]:
        found = list[Tensor]()
        for training in (False, True):
            torch.manual_seed(seed)  # of dropout
            found += model.train(training)(x, n_tasks=2).logits
        return found

    before = outputs()
    for moe in model.layers:
        assert moe.slots == moe.top_k
        surgery = ExpertManager(moe).birth(moe.top_k + more, retires, draws(seed))
        assert surgery.operation == ("handover" if retires else "birth") and surgery.parent is None
        assert (surgery.n_routed_before, surgery.n_routed_after) == (8, 8 + moe.top_k + more)
        assert moe.slots == (1 if retires else 2) * moe.top_k
    assert all(map(torch.equal, before, outputs()))


@settings(max_examples=40)
@given(managers(), ways, st.integers(4, 9), seeds)
def test_a_birth_keeps_old_rows_and_moments_and_adds_none(manager: Any, retires: bool, count: int, seed: int) -> None:
    moe = manager.moe
    before, whole = by_id(manager), state(manager)
    manager.birth(count, retires, draws(seed))
    check_sizes(manager)
    after, now = by_id(manager), state(manager)
    born = sorted(after.keys() - before.keys())
    assert born == [int(whole["next_id"]) + i for i in range(count)]
    assert all(same(after[expert], before[expert]) for expert in before)
    for expert in born:
        rows = after[expert]
        assert rows["w_in"].abs().max() <= (3 / WIDTH) ** 0.5 and rows["w_in"].std() > 0.3 * WIDTH**-0.5
        assert rows["router"].count_nonzero() and not rows["w_out"].count_nonzero()
        assert not any(values.count_nonzero() for name, values in rows.items() if ".exp_avg" in name)
    assert all(torch.equal(now[name], value) for name, value in whole.items() if name.endswith(".step"))
    assert moe.birth.tolist() == [moe.n_families - count, 0, int(retires)]
    newborn = [moe.w_in[-count:], moe.router[0, -count:]]
    assert all(not torch.equal(one, other) for drawn in newborn for one, other in pairwise(drawn))


@settings(max_examples=30)
@given(seeds, kinds, ways, st.integers(0, BIRTH_STEPS - 1))
def test_during_a_birth_a_layer_puts_out_what_the_formulas_say(seed: int, kind: Any, retires: bool, age: int) -> None:
    moe = halfway(seed, retires, age, **kind)
    x = torch.randn(kind["n_gates"], 10, WIDTH).double()
    y, routing = moe.double()(x)
    torch.testing.assert_close(y, reference(moe, x, age))
    assert routing.logits.shape == (kind["n_gates"], 10, moe.n_families)
    assert torch.equal(routing.experts, routing.experts.clamp(0, moe.n_routed - 1))
    assert torch.equal(moe.family_of[routing.experts], routing.families)
    torch.testing.assert_close(routing.logits, x @ moe.router.transpose(1, 2))
    assert not retires or (routing.families >= moe.birth[0]).all()


@settings(max_examples=30)
@given(seeds, kinds, ways, st.integers(0, BIRTH_STEPS - 1), st.booleans())
def test_during_a_birth_kernels_and_torch_agree(seed: int, kind: Any, retires: bool, age: int, learn: bool) -> None:
    moe = halfway(seed, retires, age, **kind)
    x, slope = torch.randn(2, kind["n_gates"], N, WIDTH)
    logit_slope = torch.randn(kind["n_gates"], N, moe.n_families)
    results = []
    for layer in (moe, copy.deepcopy(moe).double()):
        for plane in (layer.node_weight, layer.node_offset):
            plane.requires_grad_(learn)
        given = x.to(layer.w_in.dtype).requires_grad_()
        y, routing = layer(given)
        loss = (y * slope).sum() + (routing.logits * logit_slope).sum()
        inputs = [given, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
        results.append([y, layer.load, *torch.autograd.grad(loss, inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, check_dtype=False, rtol=1e-4, atol=1e-4)
    assert moe.load.sum() == moe.slots * kind["n_gates"] * N


@settings(max_examples=20)
@given(managers(), ways, st.integers(4, 6), seeds)
def test_at_its_end_a_birth_leaves_a_plain_layer(manager: Any, retires: bool, count: int, seed: int) -> None:
    moe = manager.moe
    n_old, old = moe.n_families, [*by_id(manager)]
    manager.birth(count, retires, draws(seed))
    torch.nn.init.normal_(moe.w_out)
    for age in range(1, BIRTH_STEPS):
        grow_older(moe, manager.optimizer)
        assert moe.under_way == Birth(n_old, age, retires) and moe.birth.tolist() == [n_old, age, retires]
    x = torch.randn(1, 10, WIDTH).double()
    wanted = reference(copy.deepcopy(moe).double(), x, BIRTH_STEPS)
    before, whole = by_id(manager), state(manager)
    n_nodes = moe.path.shape[1]
    grow_older(moe, manager.optimizer)
    check_sizes(manager)
    after, q = by_id(manager), len(old) / len(before)
    assert moe.under_way is None and not moe.birth.any() and moe.slots == moe.top_k
    torch.testing.assert_close(copy.deepcopy(moe).double()(x)[0], wanted)
    if retires:
        assert [*after] == [expert for expert in before if expert not in old]
        assert (moe.n_routed, moe.n_families, moe.path.shape[1]) == (count, count, 0)
        assert moe.family_of.tolist() == list(range(count))
        assert all(same(after[expert], before[expert]) for expert in after)
    else:
        assert moe.path.shape[1] == n_nodes
        factors = {f"{name}.exp_avg{suffix}": q ** (1 + len(suffix) // 3) for name in EXPERT for suffix in ("", "_sq")}
        for expert, rows in before.items():
            wants = {name: value * factors.get(name, 1) if expert in old else value for name, value in rows.items()}
            assert wants.keys() == after[expert].keys()
            for name, value in wants.items():
                torch.testing.assert_close(after[expert][name], value, rtol=1e-6, atol=0)
    whole_after = state(manager)
    assert all(torch.equal(whole_after[name], whole[name]) for name in whole if name in ("w_in.step", "router.step"))
    grow_older(moe, manager.optimizer)
    assert same(state(manager), whole_after)
    train(manager)
    operate(manager, "split", 0)


OPERATIONS: dict[str, Any] = {
    "birth": lambda manager: manager.birth(4),
    "handover": lambda manager: manager.birth(4, retires=True),
    "upcycle": lambda manager: manager.upcycle(2),
    "split": lambda manager: manager.split(int(manager.moe.expert_id[0]), torch.ones(WIDTH), 0.0),
    **{name: lambda manager, name=name: operate(manager, name, 0) for name in ("clone", "reinit", "remove", "merge")},
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("retires", [False, True])
def test_an_operation_while_a_birth_is_under_way_is_refused(operation: str, retires: bool) -> None:
    moe, manager = trained(0)
    operate(manager, "split", 0)
    manager.birth(4, retires)
    for age in (0, 99):
        assert moe.under_way and moe.under_way.age == age
        before, parameters, tables = state(manager), list(moe.parameters()), (moe._root.clone(), moe._child.clone())
        with pytest.raises(SurgeryRefused, match=f"a birth is under way for {age} steps, and takes 100: wait"):
            OPERATIONS[operation](manager)
        assert same(before, state(manager)) and moe.under_way == Birth(5, age, retires)
        assert all(one is other for one, other in zip(parameters, moe.parameters(), strict=True))
        assert all(map(torch.equal, tables, (moe._root, moe._child)))
        for _ in range(99):
            grow_older(moe, manager.optimizer)
    OPERATIONS[operation](manager) if operation != "merge" or not retires else None


@pytest.mark.parametrize(
    ("why", "refused"),
    [
        ("birth of 0 experts: it must be at least 1", lambda manager: manager.birth(0)),
        ("birth of -1 experts: it must be at least 1", lambda manager: manager.birth(-1)),
        ("birth of 1 experts: it must be at least 2", lambda manager: manager.birth(1, retires=True)),
        ("upcycle of 0 experts: it must be at least 1", lambda manager: manager.upcycle(0)),
        ("upcycle of -3 experts: it must be at least 1", lambda manager: manager.upcycle(-3)),
    ],
)
def test_growth_by_too_few_experts_is_refused(why: str, refused: Any) -> None:
    moe, manager = trained(0)
    before = state(manager)
    with pytest.raises(SurgeryRefused, match=f"^{why}$"):
        refused(manager)
    assert same(before, state(manager)) and moe.under_way is None


def test_no_birth_is_set_that_does_not_fit_the_layer() -> None:
    moe = MoE(WIDTH, 6, 8, 2)
    for fits in (Birth(5, 0, False), Birth(2, 99, True), Birth(4, 50, True), None):
        moe.set_birth(fits)
        assert moe.under_way == fits and moe.birth.tolist() == [*(fits or (0, 0, 0))]
    for bad in ((1, 0, 0), (6, 0, 0), (-1, 0, 0), (5, 100, 0), (5, -1, 0), (5, 0, 1), (5, 0, 7), (0, 3, 0), (0, 0, 1)):
        moe.birth = torch.tensor(bad)
        with pytest.raises(ValueError, match="does not fit a layer of 6 families with top_k = 2"):
            moe.refresh()


@settings(max_examples=30)
@given(managers(), st.integers(1, 70), seeds, st.sampled_from(["scaled", "carried"]))
def test_upcycling_copies_experts_in_turn_with_router_rows(manager: Any, count: int, seed: int, moments: Any) -> None:
    moe, manager.moments = manager.moe, moments
    before, n, known = by_id(manager), moe.n_routed, moe.expert_id.tolist()
    parents = [known[i % n] for i in range(count)]
    family = dict(zip(known, moe.family_of.tolist(), strict=True))
    families = [family[parent] for parent in parents]
    surgery = manager.upcycle(count, draws(seed))
    check_sizes(manager)
    assert (surgery.operation, surgery.n_routed_before, surgery.n_routed_after) == ("upcycle", n, n + count)
    assert moe.expert_id.tolist()[:n] == known and moe.family_of[-count:].bincount().max() == 1
    after = by_id(manager)
    for expert, parent in zip(moe.expert_id.tolist(), [*known, *parents], strict=True):
        shares = {"w": 1 / (1 + parents.count(parent)), "r": 1 / (1 + families.count(family[parent]))}
        for name, value in before[parent].items():
            now, power = after[expert][name], {"exp_avg": 1, "exp_avg_sq": 2}.get(name.split(".")[-1], 0)
            if name == "router" and expert not in known:
                moved = (now - value).norm(dim=-1) / value.norm(dim=-1)
                assert moved.gt(0.01).all() and moved.lt(0.4).all()
            elif not power or moments == "carried" or shares[name[0]] == 1:
                assert torch.equal(now, value)
            else:
                torch.testing.assert_close(now, value * shares[name[0]] ** power)


@settings(max_examples=20)
@given(managers(), picks)
def test_a_killed_expert_stays_exactly_zero_in_training(manager: Any, pick: int) -> None:
    moe, before = manager.moe, by_id(manager)
    dead = pick % moe.n_routed
    kill(moe, manager.optimizer, [dead])
    assert all(same(rows, before[expert]) for e, (expert, rows) in enumerate(by_id(manager).items()) if e != dead)
    for _ in range(3):
        train(manager)
        rows = by_id(manager)[int(moe.expert_id[dead])]
        assert not any(value.count_nonzero() for name, value in rows.items() if name.startswith(EXPERT))
    assert state(manager)["w_in"].count_nonzero() > 0 or moe.n_routed == 1
