"""The surgeon does what the controller says, shows it what an operation would cost, and leaves no trace of asking."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phasegate.model.moe import MoE
from phasegate.params.fields import override
from phasegate.params.phases import Grow, GrowMany, Prune, Schedule
from phasegate.surgery import hyperplanes
from phasegate.surgery.controllers import Action, PlannedController, PlannedPolicy, Proposal, Situation
from phasegate.surgery.operations import ExpertManager
from phasegate.surgery.probe import Probe
from phasegate.surgery.surgeon import Surgeon, Treatment
from phasegate.training.course import load_start
from phasegate.training.predictions import correct, predict
from tests.models import draws, siblings, unchanged

BLOCKS = (0, 1)
DIRECTIONS = pytest.mark.parametrize("direction", ["random", "principal", "loss"])
Make = Callable[..., Surgeon]
GROW, PRUNE = partial(Proposal, Action.GROW), partial(Proposal, Action.PRUNE)


@pytest.fixture
def make(prepared: Path, baselines: Path, schedule: Schedule) -> Make:
    """Makes a surgeon of the baseline: plain, or with siblings of different weights, some of them nested."""

    def surgeon(
        grow: Grow | None = "split", prune: Prune | None = "remove", grown: bool = False, **changes: Any
    ) -> Surgeon:
        made = override(schedule, {"max_experts": 12, **changes}, "p7b")
        model, optimizer, course = load_start(prepared, baselines / "seed-0", 0, made)
        if grown:
            random = draws()
            for moe in model.layers:
                for expert in (0, 1, 1, 6):
                    ExpertManager(moe, optimizer).split(expert, hyperplanes.random_direction(16, random), 0.1)
                for weight in (moe.w_in, moe.w_out):
                    weight.data += 0.2 * torch.randn(weight.shape, generator=random)
        return Surgeon(model, optimizer, Treatment(PlannedPolicy(1), grow, prune), course)

    return surgeon


def ask(surgeon: Surgeon, block: int, question: Any = None, proposal: Any = None, step: int = 4) -> Any:
    """Let a controller ask about one layer, and perhaps operate, and nobody on the other; returns what it heard."""
    heard: list[Any] = []

    def propose(situation: Situation) -> Proposal | None:
        heard.append(question and question(situation))
        return proposal if situation.probe.block == block else None

    def plan(situation: Situation) -> list[Proposal]:
        planned = propose(situation)
        return [planned] if planned else []

    controllers: list[Any] = [SimpleNamespace(plan=plan) for _ in BLOCKS]
    surgeon.controllers = controllers
    surgeon.act(step)
    return heard[block]


def operate(surgeon: Surgeon, block: int, proposal: Proposal, step: int = 4) -> None:
    ask(surgeon, block, proposal=proposal, step=step)


def signal_loss(surgeon: Surgeon, train: bool = False) -> Tensor:
    return F.cross_entropy(surgeon.model.train(train)(surgeon.course.signal.x).logits[0], surgeon.course.signal.y)


def loss_after(surgeon: Surgeon, *proposals: Proposal) -> Callable[[Situation], dict[Proposal, float]]:
    """The question what these proposals would cost; without any, what each allowed prune would."""
    planned = PlannedPolicy(1).build(surgeon.model, surgeon.optimizer, surgeon.course)
    assert isinstance(planned, PlannedController)

    def answer(given: Situation) -> dict[Proposal, float]:
        return {asked: planned.loss_after(given, asked) for asked in proposals or given.allowed.proposals(Action.PRUNE)}

    return answer


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("prune", ["remove", "merge"])
def test_the_loss_after_a_prune_is_what_it_really_leaves(prune: Prune, block: int, make: Make) -> None:
    surgeon = make(prune=prune, grown=True)
    promised = ask(surgeon, block, loss_after(surgeon))
    assert len(promised) == (9 if prune == "remove" else 6) and len(set(promised.values())) > 1
    for proposal, loss in promised.items():
        surgeon = make(prune=prune, grown=True)
        operate(surgeon, block, proposal)
        assert surgeon.log[-1]["operation"] == prune and surgeon.model.layers[block].n_routed == 8
        assert signal_loss(surgeon).item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("grow", ["split", "clone"])
def test_the_loss_after_growth_is_what_it_really_leaves(grow: Grow, make: Make) -> None:
    surgeon = make(grow, grown=True)
    promised = ask(surgeon, 1, loss_after(surgeon, GROW(1)), GROW(1))
    assert signal_loss(surgeon).item() == pytest.approx(promised[GROW(1)], abs=1e-6)


@pytest.mark.parametrize("grow", ["split", "clone"])
def test_copies_get_their_share_of_the_moments_unless_these_are_carried(grow: Grow, make: Make) -> None:
    shares = []
    for moments in ("scaled", "carried"):
        surgeon = make(grow)
        surgeon.treatment = replace(surgeon.treatment, moments=moments)
        layer = surgeon.model.layers[0]
        before, wanted = surgeon.optimizer.state[layer.w_in]["exp_avg"][1].norm(), ask(surgeon, 0, share_of_copy)
        operate(surgeon, 0, GROW(1))
        shares.append(float(surgeon.optimizer.state[layer.w_in]["exp_avg"][-1].norm() / before))
    assert shares == pytest.approx([0.5 if grow == "split" else wanted, 1], abs=0.01) and 0.5 < wanted < 1


def share_of_copy(situation: Situation) -> float:
    return situation.probe.share_of_copy(1)


@pytest.mark.parametrize("direction", ["random", "loss"])
@pytest.mark.parametrize("prune", ["remove", "merge"])
def test_asking_changes_nothing(prune: Prune, direction: str, make: Make) -> None:
    surgeon = make(prune=prune, grown=True, split_direction=direction)
    train_step(surgeon)
    torch.manual_seed(5)
    with unchanged(surgeon.model, surgeon.optimizer):
        for block in BLOCKS:
            ask(surgeon, block, loss_after(surgeon))
            ask(surgeon, block, loss_after(surgeon, GROW(2)))
    assert surgeon.log == []
    with pytest.raises(AssertionError), unchanged(surgeon.model, surgeon.optimizer):
        train_step(surgeon)


def train_step(surgeon: Surgeon) -> None:
    surgeon.optimizer.zero_grad()
    signal_loss(surgeon, train=True).backward()  # type: ignore[no-untyped-call]
    surgeon.optimizer.step()


def test_a_refused_question_leaves_the_layer_in_its_place(make: Make) -> None:
    surgeon = make(prune="merge")
    with unchanged(surgeon.model, surgeon.optimizer), pytest.raises(AssertionError, match="experts with a sibling"):
        ask(surgeon, 0, loss_after(surgeon, PRUNE(0)))


def tokens_of(surgeon: Surgeon, block: int) -> Tensor:
    """Signal tokens per expert."""
    run = predict(surgeon.model, surgeon.course.signal.x)[0].routings[block].experts.flatten()
    return run.bincount(minlength=surgeon.model.layers[block].n_routed)


def signal_logits(surgeon: Surgeon) -> Tensor:
    return predict(surgeon.model, surgeon.course.signal.x)[0].logits[0]


@pytest.mark.parametrize("grown", [False, True])
@DIRECTIONS
def test_a_split_keeps_the_function_and_halves_the_tokens(direction: str, grown: bool, make: Make) -> None:
    surgeon = make(split_direction=direction, grown=grown, cooldown=0)
    for block in BLOCKS:
        for e in range(3):
            logits, count = signal_logits(surgeon), tokens_of(surgeon, block)
            operate(surgeon, block, GROW(e))
            after = tokens_of(surgeon, block)
            assert after[e] + after[-1] == count[e] > 1 and abs(int(after[e]) - int(after[-1])) <= 1
            assert torch.equal(after[:-1].index_fill(0, torch.tensor(e), 0), count.index_fill(0, torch.tensor(e), 0))
            change = signal_logits(surgeon) - logits
            assert not change.any() and surgeon.log[-1]["output_change"] == 0


@DIRECTIONS
def test_an_expert_without_tokens_can_be_split_too(direction: str, make: Make) -> None:
    surgeon = make(split_direction=direction)
    surgeon.model.layers[0].selection_bias[:, 1] = -1e3
    logits = signal_logits(surgeon)
    operate(surgeon, 0, GROW(1))
    torch.testing.assert_close(signal_logits(surgeon), logits)
    assert surgeon.model.layers[0].node_weight.norm().item() == pytest.approx(1, abs=1e-6)


def test_directions_differ_and_only_the_random_one_depends_on_the_draws(make: Make) -> None:
    planes: dict[tuple[str, int], Tensor] = {}
    for direction in ("random", "principal", "loss"):
        for step in (4, 8):
            surgeon = make(split_direction=direction)
            operate(surgeon, 0, GROW(1), step)
            planes[direction, step] = surgeon.model.layers[0].node_weight.detach()
            assert planes[direction, step].norm().item() == pytest.approx(1, abs=1e-6)
    for one, other in (("random", "principal"), ("principal", "loss"), ("loss", "random")):
        assert torch.equal(planes[one, 4], planes[one, 8]) == (one != "random")
        assert abs((planes[one, 4] * planes[other, 4]).sum().item()) < 0.999


@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_of_the_loss_direction_sum_to_the_weights(block: int, make: Make, monkeypatch: Any) -> None:
    surgeon, seen, e = make(split_direction="loss", grown=True), list[Tensor](), 1
    layer, kernel = surgeon.model.layers[block], hyperplanes.gradient_kernel

    def spy(moe: MoE, index: int, *given: Tensor) -> Tensor:
        assert moe is layer and index == e
        seen.extend(given)
        return kernel(moe, index, *given)

    monkeypatch.setattr(hyperplanes, "gradient_kernel", spy)
    expected = [g[e] for g in torch.autograd.grad(signal_loss(surgeon), [layer.w_in, layer.w_out])]
    with torch.no_grad():  # as where the surgeon acts
        normal, *_ = hyperplanes.cut(Probe(surgeon.model, block, surgeon.course.signal), e, "loss", torch.Generator())
        tokens, gradients = seen
        before = tokens @ layer.w_in[e]
        found = [tokens.T @ (gradients @ layer.w_out[e].T * (before > 0)), before.relu().T @ gradients]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(normal, hyperplanes.loss_direction(tokens, kernel(layer, e, tokens, gradients)))
    assert not layer._forward_hooks


@pytest.mark.parametrize("block", BLOCKS)
def test_no_expert_without_a_sibling_leaf_is_merged(block: int, make: Make) -> None:
    surgeon = make(prune="merge", grown=True, cooldown=0, min_experts=1)
    moe = surgeon.model.layers[block]
    for merged in range(4):
        pairs = siblings(moe)
        assert [e for e, may in enumerate(ask(surgeon, block, masks)[1]) if may] == sorted(pairs)
        e = sorted(pairs)[merged % len(pairs)]
        gone, kept = int(moe.expert_id[e]), int(moe.expert_id[pairs[e]])
        operate(surgeon, block, PRUNE(e))
        assert [surgeon.log[-1][name] for name in ("operation", "expert", "parent")] == ["merge", gone, kept]
    assert moe is surgeon.model.layers[block] and moe.n_routed == 5 and not any(ask(surgeon, block, masks)[1])


@pytest.mark.parametrize("starved", [False, True])
def test_a_merge_weighs_both_by_their_signal_tokens_or_equally_without_any(starved: bool, make: Make) -> None:
    surgeon = make(prune="merge", grown=True)
    moe = surgeon.model.layers[0]
    a, b = next(iter(siblings(moe).items()))
    if starved:
        moe.selection_bias[:, moe.family_of[a]] = -1e3
    count = tokens_of(surgeon, 0)
    share = 0.5 if starved else float(count[a] / (count[a] + count[b]))
    assert abs(share - 0.5) > 0.01 or starved
    expected, kept = (share * moe.w_in[a] + (1 - share) * moe.w_in[b]).detach(), int(moe.expert_id[b])
    operate(surgeon, 0, PRUNE(a))
    torch.testing.assert_close(moe.w_in[moe.expert_id == kept][0].detach(), expected)


def masks(situation: Situation) -> tuple[list[bool], list[bool]]:
    return situation.allowed.grow.tolist(), situation.allowed.prune.tolist()


def test_what_is_allowed_keeps_to_the_bounds(make: Make) -> None:
    yes, no = [True] * 5, [False] * 5
    assert ask(make(min_experts=4, max_experts=6), 0, masks) == (yes, yes)
    assert ask(make(min_experts=4, max_experts=5), 0, masks) == (no, yes)
    assert ask(make(min_experts=5, max_experts=6), 0, masks) == (yes, no)
    assert ask(make(prune="merge"), 0, masks) == (yes, no)
    assert ask(make(grow=None), 0, masks) == (no, yes)
    assert ask(make(prune=None), 0, masks) == (yes, no)


@pytest.mark.parametrize(("way", "count", "most"), [("birth", 3, 8), ("upcycle", 3, 8), ("handover", 7, 7)])
def test_growth_by_many_keeps_to_the_bounds_and_a_birth_rests_until_its_end(
    way: GrowMany, count: int, most: int, make: Make
) -> None:
    surgeons = [make(max_experts=max_experts) for max_experts in (most - 1, most)]
    for surgeon in surgeons:
        surgeon.treatment = replace(surgeon.treatment, grow=way, count=count)
    few, enough = surgeons
    assert ask(few, 0, masks)[0] == [False] * 5
    assert ask(enough, 0, masks)[0] == [True] * 5
    operate(enough, 0, Proposal(Action.GROW, 1))
    (row,) = enough.log
    after = 5 + count
    assert (row["operation"], row["n_routed_before"], row["n_routed_after"]) == (way, 5, after)
    assert (row["output_change"] == 0) == (way != "upcycle")
    assert way == "upcycle" or ask(enough, 0, masks, step=20) == ([False] * after, [False] * after)
    assert ask(enough, 1, masks, step=20)[1] == [True] * 5


def test_experts_that_surgery_touched_rest_on_their_own_layer_only(make: Make) -> None:
    surgeon = make(cooldown=8)
    operate(surgeon, 0, GROW(2), 4)
    others = [True, True, False, True, True, False]
    assert ask(surgeon, 0, masks, step=8) == (others, others)
    assert ask(surgeon, 0, masks, step=12) == ([True] * 6, [True] * 6)
    assert ask(surgeon, 1, masks, step=8) == ([True] * 5, [True] * 5)


def test_an_expert_is_not_merged_into_a_sibling_that_rests(make: Make) -> None:
    surgeon = make(prune="merge", grown=True, cooldown=8)  # expert 1's family is ((1 | 7) | (6 | 8))
    moe = surgeon.model.layers[0]
    for merged, step in ((7, 4), (8, 12)):
        operate(surgeon, 0, PRUNE(moe.expert_id.tolist().index(merged)), step=step)
    for step, free in ((16, {0, 5}), (20, {0, 1, 5, 6})):
        _, prunable = ask(surgeon, 0, masks, step=step)
        assert {e for e, may in zip(moe.expert_id.tolist(), prunable, strict=True) if may} == free


def test_as_many_families_stay_as_a_token_runs(make: Make) -> None:
    surgeon = make(min_experts=1, cooldown=0)
    operate(surgeon, 0, GROW(0))
    for _ in range(3):
        operate(surgeon, 0, PRUNE(1))
    assert ask(surgeon, 0, masks)[1] == [True, False, True]  # the halves of one family, and an only member


def test_several_experts_go_at_once_down_to_the_bounds(make: Make) -> None:
    surgeon = make(min_experts=3)
    at_once = ask(surgeon, 1, lambda situation: situation.allowed.at_once)
    assert at_once == surgeon.model.layers[1].n_routed - max(3, surgeon.model.layers[1].top_k)
    ids, chosen = surgeon.model.layers[1].expert_id.tolist(), range(at_once)
    going: Any = SimpleNamespace(plan=lambda situation: [PRUNE(e) for e in chosen] if situation.probe.block else [])
    surgeon.controllers = [going, going]
    surgeon.act(4)
    assert surgeon.model.layers[1].expert_id.tolist() == ids[at_once:]
    assert sorted(row["expert"] for row in surgeon.log) == sorted(ids[:at_once])
    assert ask(surgeon, 1, lambda situation: situation.allowed.at_once, step=8) == 1
    assert ask(make(prune="merge", grown=True), 1, lambda situation: situation.allowed.at_once) == 1


def test_an_operation_has_recovered_at_the_first_point_that_makes_it_good(make: Make) -> None:
    surgeon = make()
    before = 100 * correct(surgeon.model, surgeon.course.gate) / len(surgeon.course.gate)
    worst = max(promised := ask(other := make(), 0, loss_after(other)), key=promised.get)
    operate(surgeon, 0, worst)
    (row,) = surgeon.log
    assert row["accuracy_before"] == before > row["accuracy_after"]
    assert row["accuracy_after"] == 100 * correct(surgeon.model, surgeon.course.gate) / len(surgeon.course.gate)
    surgeon.mark_recovered(8, before - 0.5)
    assert row["recovery_steps"] != row["recovery_steps"]
    for step in (12, 16):
        surgeon.mark_recovered(step, before)
        assert row["recovery_steps"] == 8
