"""Adam's moments go through surgery with their rows, and the first update afterwards is an ordinary one."""

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import AdamW

from phasegate.surgery.hyperplanes import halve, principal_direction
from phasegate.surgery.operations import ExpertManager, Moments
from tests.layers import EXPERT, RATE, WIDTH, by_id, classify, managers, operate, picks, train, trained


@settings(max_examples=40)
@given(managers())
def test_both_halves_and_a_trained_hyperplane_learn_from_the_very_next_step(manager: Any) -> None:
    moe = manager.moe
    x = torch.randn(400, WIDTH, dtype=moe.w_in.dtype)
    busiest = int(moe(x[None])[1].experts.flatten().mode().values)
    tokens = x[(moe(x[None])[1].experts[0] == busiest).any(-1)]
    manager.split(int(moe.expert_id[busiest]), *halve(tokens, principal_direction(tokens)))
    manager.optimizer.zero_grad()
    (moe(x[None])[0] * torch.randn_like(x)).sum().backward()
    for half in (busiest, -1):
        assert moe.w_in.grad[half].any() and moe.w_out.grad[half].any()
    for hyperplane in (moe.node_weight, moe.node_offset):
        assert hyperplane.grad[-1].any() if hyperplane.requires_grad else hyperplane.grad is None


OBJECTIVES = {"noise": train, "classification": classify}
LONG = 10_000
PLANE = ("node_weight", "node_offset")
objectives = pytest.mark.parametrize("objective", OBJECTIVES)


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
    return {name: rows.square().view(len(rows), -1).mean(1) for name, rows in update.items() if len(rows)}


def first_updates(
    objective: str, operation: str, seed: int, halves: bool, spoil: Callable[[Any], None] = lambda manager: None
) -> tuple[dict[str, float], dict[str, float]]:
    """RMS of the first update after an operation, of new rows and of untouched ones; on each expert in turn, twice."""
    new, untouched = defaultdict[str, list[Tensor]](list), defaultdict[str, list[Tensor]](list)
    original = practised(objective, seed, halves)
    torch.manual_seed(seed)
    for pick in range(40, 40 + 2 * original.moe.n_routed):
        manager = copy.deepcopy(original)
        surgery, moe = operate(manager, operation, pick), manager.moe
        spoil(manager)
        update, ids = next_update(manager, objective), moe.expert_id.tolist()
        involved = [ids.index(expert) for expert in (surgery.expert, surgery.parent) if expert in ids]
        others = [e for e, family in enumerate(moe.family_of) if family not in moe.family_of[involved]]
        for name in EXPERT:
            new[name].append(update[name][involved[:1] if operation == "clone" else involved])
            untouched[name].append(update[name][others])
        untouched["router"].append(update["router"][moe.family_of[others]])
        for name in {"split": PLANE, "merge": ()}.get(operation, ("router",)):
            new[name].append(update[name][-1:])
    rms = [{name: torch.cat(rows).mean().sqrt().item() for name, rows in kind.items()} for kind in (new, untouched)]
    return rms[0], rms[1]


@objectives
@pytest.mark.parametrize("case", ["split", "split halves", "clone", "reinit", "merge halves"])
@pytest.mark.parametrize("seed", range(3))
def test_the_first_update_after_surgery_is_an_ordinary_one(objective: str, case: str, seed: int) -> None:
    new, untouched = first_updates(objective, case.split()[0], seed, halves=case.endswith("halves"))
    for name, size in new.items():
        assert 0 < size <= 1.2 * untouched.get(name, untouched["router"]), name


@objectives
@pytest.mark.parametrize("operation, name", [("reinit", "w_in"), ("reinit", "w_out"), *(("split", p) for p in PLANE)])
def test_without_its_moments_a_first_update_is_too_large(objective: str, operation: str, name: str) -> None:
    """Zeroed second moments would triple it; a step count of its own would make it the learning rate itself."""
    for lost, low, high in ((False, 3, 3.3), (True, 0.99, 1.01))[: 1 + (name in PLANE)]:

        def spoil(manager: Any, lost: bool = lost) -> None:
            parameter = getattr(manager.moe, name)
            manager.optimizer.state[parameter]["exp_avg_sq"][-1] = 0
            if lost:
                del manager.optimizer.state[parameter]

        new, untouched = first_updates(objective, operation, 0, False, spoil)
        assert low < new[name] < high and new[name] > 2 * untouched["router"] and untouched["router"] < 0.5


def test_the_first_update_of_a_hyperplane_is_ordinary_where_another_has_gone() -> None:
    manager: Any = copy.deepcopy(practised("noise", 0, False))
    surgery = operate(manager, "split", 0)
    train(manager)
    manager.remove(surgery.expert)
    operate(manager, "split", 1)
    assert manager.optimizer.state[manager.moe.node_weight]["step"] > LONG
    update = next_update(manager, "noise")
    for name in PLANE:
        assert 0 < update[name][-1] <= 1.2**2 * update["router"].mean()


@settings(max_examples=40)
@given(managers().filter(lambda manager: manager.moe.node_weight.requires_grad), picks)
def test_a_hyperplane_starts_with_the_second_moment_of_its_familys_router_row(manager: Any, pick: int) -> None:
    moe = manager.moe
    surgery = operate(manager, "split", pick)
    family = moe.family_of[moe.expert_id == surgery.expert].item()
    row = manager.optimizer.state[moe.router]["exp_avg_sq"][0, family]
    weight, offset = (manager.optimizer.state[hyperplane] for hyperplane in (moe.node_weight, moe.node_offset))
    assert torch.equal(weight["exp_avg_sq"][-1], row) and torch.equal(offset["exp_avg_sq"][-1], row.mean())
    assert not weight["exp_avg"][-1].any() and not offset["exp_avg"][-1].any()


@settings(max_examples=40)
@given(managers(planned=False), picks, st.floats(0.01, 0.99), st.sampled_from(["scaled", "carried"]))
def test_moments_of_copies_are_of_their_tokens_share(manager: Any, pick: int, share: float, moments: Moments) -> None:
    for clones, kept in ((False, 1 - share), (True, share)):
        grown = copy.deepcopy(manager)
        grown.moments, moe, e = moments, grown.moe, pick % manager.moe.n_routed
        expert, before = int(moe.expert_id[e]), by_id(grown)[int(moe.expert_id[e])]
        surgery = grown.clone(expert, share) if clones else grown.split(expert, torch.ones(WIDTH), 0, share)
        after = by_id(grown)
        for one, part in ((expert, kept), (surgery.expert, share)):
            for name, rows in after[one].items():
                changes = moments == "scaled" and (clones or not name.startswith("router"))
                power = {"exp_avg": 1, "exp_avg_sq": 2}.get(name.split(".")[-1], 0) * changes
                torch.testing.assert_close(rows, before[name] * part**power, msg=name)


@settings(max_examples=20)
@given(managers(planned=False), picks)
def test_the_router_row_of_a_fresh_expert_has_the_norm_of_trained_ones(manager: Any, pick: int) -> None:
    manager.moe.router.data *= 7
    operate(manager, "reinit", pick)
    norms = manager.moe.router.norm(dim=-1)
    torch.testing.assert_close(norms[:, -1], norms[:, :-1].mean(1))
