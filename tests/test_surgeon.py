"""The surgeon does what the controller says, shows it what an operation would cost, and leaves no trace of asking."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phasegate import hyperplanes
from phasegate.checkpoint import load
from phasegate.control import Controller, Plan, Proposal, Situation
from phasegate.expert_manager import ExpertManager
from phasegate.model import Model
from phasegate.moe import MoE
from phasegate.phase_params import Grow, Prune, Schedule
from phasegate.sections import override
from phasegate.surgeon import Surgeon, Treatment
from phasegate.training import Course, correct, load_examples, predict

CPU = torch.device("cpu")
BLOCKS = (0, 1)


class Asked(Controller):
    """Remembers the situation's answers, and does as told."""

    def __init__(self, ask: Callable[[Situation], Any], proposal: Proposal | None = None) -> None:
        self.ask, self.proposal, self.heard = ask, proposal, None

    def propose(self, situation: Situation) -> Proposal | None:
        self.heard = self.ask(situation)
        return self.proposal


def nothing(situation: Situation) -> None:
    """No question."""


@pytest.fixture
def make(prepared: Path, baselines: Path, schedule: Schedule) -> Callable[..., Surgeon]:
    """Makes a surgeon of the baseline: plain, or with siblings of different weights, some of them nested."""
    train, signal, gate = load_examples(prepared, CPU)

    def surgeon(grow: Grow = "split", prune: Prune = "remove", grown: bool = False, **changes: Any) -> Surgeon:
        start = load(baselines / "seed-0", gate)
        assert isinstance(start.model, Model) and start.optimizer is not None
        if grown:
            draws = torch.Generator().manual_seed(0)
            for moe in start.model.layers:
                for expert in (0, 1, 1, 6):
                    direction = hyperplanes.random_direction(16, draws)
                    ExpertManager(moe, start.optimizer).split(expert, direction, 0.1)
                for weight in (moe.w_in, moe.w_out):
                    weight.data += 0.2 * torch.randn(weight.shape, generator=draws)
        made = override(schedule, {"max_experts": 12, **changes}, "p7b")
        course = Course(train, signal, gate, start.record.training, made, 0)
        return Surgeon(start.model, start.optimizer, Treatment(Plan(1), grow, prune), course)

    return surgeon


def act(surgeon: Surgeon, block: int, controller: Asked, step: int = 4) -> Any:
    """Let a controller decide on one layer, and nobody on the other; returns what it heard."""
    surgeon.controllers = [controller if b == block else Controller() for b in BLOCKS]
    surgeon.act(step)
    return controller.heard


def signal_loss(surgeon: Surgeon) -> float:
    with torch.no_grad():
        return F.cross_entropy(surgeon.model.eval()(surgeon.course.signal.x).logits[0], surgeon.course.signal.y).item()


def state(surgeon: Surgeon) -> list[Any]:
    """Everything that asking must not touch: tensors (and which object holds them), moments, gradients, randomness."""
    model, optimizer = surgeon.model, surgeon.optimizer
    tensors = {**model.state_dict(), "random": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
        tensors |= {f"{name}.grad": parameter.grad} if parameter.grad is not None else {}
    owned = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    objects = [id(layer) for layer in model.layers] + [id(parameter) for parameter in model.parameters()]
    tables = [(moe._root.tolist(), moe._child.tolist(), moe._depth, len(moe._forward_hooks)) for moe in model.layers]
    return [{name: value.clone() for name, value in tensors.items()}, owned, objects, len(optimizer.state), tables]


def unchanged(surgeon: Surgeon, before: list[Any]) -> bool:
    tensors, *others = state(surgeon)
    held = before[0]
    equal = tensors.keys() == held.keys() and all(torch.equal(tensors[name], held[name]) for name in held)
    return equal and others == before[1:]


def every_prune(situation: Situation) -> dict[int, float]:
    """What each allowed prune would cost."""
    return {e: situation.loss_after(Proposal("prune", e)) for e in situation.allowed.prune.nonzero().flatten().tolist()}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("prune", ["remove", "merge"])
def test_the_loss_after_a_prune_is_the_loss_that_it_really_leaves(
    prune: Prune, block: int, make: Callable[..., Surgeon]
) -> None:
    promised = act(make(prune=prune, grown=True), block, Asked(every_prune))
    assert len(promised) == (9 if prune == "remove" else 6) and len(set(promised.values())) > 1
    for e, loss in promised.items():
        surgeon = make(prune=prune, grown=True)
        act(surgeon, block, Asked(nothing, Proposal("prune", e)))
        assert surgeon.log[-1]["operation"] == prune and surgeon.model.layers[block].n_routed == 8
        assert signal_loss(surgeon) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("grow", ["split", "clone"])
def test_the_loss_after_growth_is_the_loss_that_it_really_leaves(grow: Grow, make: Callable[..., Surgeon]) -> None:
    surgeon = make(grow, grown=True)
    loss = act(surgeon, 1, Asked(lambda situation: situation.loss_after(Proposal("grow", 1)), Proposal("grow", 1)))
    assert signal_loss(surgeon) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("direction", ["random", "loss"])
@pytest.mark.parametrize("prune", ["remove", "merge"])
def test_asking_changes_nothing(prune: Prune, direction: str, make: Callable[..., Surgeon]) -> None:
    surgeon = make(prune=prune, grown=True, split_direction=direction)
    surgeon.model.train()
    train_step(surgeon)
    torch.manual_seed(5)
    before = state(surgeon)
    for block in BLOCKS:
        act(surgeon, block, Asked(every_prune))
        act(surgeon, block, Asked(lambda situation: situation.loss_after(Proposal("grow", 2))))
    assert unchanged(surgeon, before) and surgeon.log == []
    train_step(surgeon)
    assert not unchanged(surgeon, before)


def train_step(surgeon: Surgeon) -> None:
    loss = F.cross_entropy(surgeon.model.train()(surgeon.course.signal.x).logits[0], surgeon.course.signal.y)
    surgeon.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    surgeon.optimizer.step()


def test_a_refused_question_leaves_the_layer_in_its_place(make: Callable[..., Surgeon]) -> None:
    surgeon = make(prune="merge")
    before = state(surgeon)
    with pytest.raises(AssertionError, match="only experts with a sibling"):
        act(surgeon, 0, Asked(lambda situation: situation.loss_after(Proposal("prune", 0))))
    assert unchanged(surgeon, before)


def tokens_of(surgeon: Surgeon, block: int) -> Tensor:
    """Signal tokens per expert."""
    moe = surgeon.model.layers[block]
    return (
        predict(surgeon.model, surgeon.course.signal.x)[0]
        .routings[block]
        .experts.flatten()
        .bincount(minlength=moe.n_routed)
    )


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("direction", ["random", "principal", "loss"])
def test_a_split_along_any_direction_keeps_the_function_and_halves_the_tokens(
    direction: str, grown: bool, make: Callable[..., Surgeon]
) -> None:
    surgeon = make(split_direction=direction, grown=grown, cooldown=0)
    for block in BLOCKS:
        for e in range(3):
            logits, count = predict(surgeon.model, surgeon.course.signal.x)[0].logits[0], tokens_of(surgeon, block)
            act(surgeon, block, Asked(nothing, Proposal("grow", e)))
            after = tokens_of(surgeon, block)
            assert after[e] + after[-1] == count[e] > 1 and abs(int(after[e]) - int(after[-1])) <= 1
            assert torch.equal(after[:-1].index_fill(0, torch.tensor(e), 0), count.index_fill(0, torch.tensor(e), 0))
            change = predict(surgeon.model, surgeon.course.signal.x)[0].logits[0] - logits
            assert change.norm() <= 1e-6 * logits.norm() and surgeon.log[-1]["output_change"] <= 1e-6


@pytest.mark.parametrize("direction", ["random", "principal", "loss"])
def test_an_expert_without_tokens_can_be_split_too(direction: str, make: Callable[..., Surgeon]) -> None:
    surgeon = make(split_direction=direction)
    surgeon.model.layers[0].selection_bias[:, 1] = -1e3
    logits = predict(surgeon.model, surgeon.course.signal.x)[0].logits[0]
    act(surgeon, 0, Asked(nothing, Proposal("grow", 1)))
    torch.testing.assert_close(predict(surgeon.model, surgeon.course.signal.x)[0].logits[0], logits)
    assert surgeon.model.layers[0].node_weight.norm().item() == pytest.approx(1, abs=1e-6)


def test_the_three_directions_differ_and_only_the_random_one_depends_on_the_draws(
    make: Callable[..., Surgeon],
) -> None:
    planes: dict[tuple[str, int], Tensor] = {}
    for direction in ("random", "principal", "loss"):
        for step in (4, 8):
            surgeon = make(split_direction=direction)
            act(surgeon, 0, Asked(nothing, Proposal("grow", 1)), step)
            planes[direction, step] = surgeon.model.layers[0].node_weight.detach()
            assert planes[direction, step].norm().item() == pytest.approx(1, abs=1e-6)
    for direction in ("random", "principal", "loss"):
        assert torch.equal(planes[direction, 4], planes[direction, 8]) == (direction != "random")
    for one, other in (("random", "principal"), ("random", "loss"), ("principal", "loss")):
        assert abs((planes[one, 4] * planes[other, 4]).sum().item()) < 0.999


@pytest.mark.parametrize("block", BLOCKS)
def test_the_gradients_behind_the_loss_direction_sum_to_the_weights_gradient(
    block: int, make: Callable[..., Surgeon], monkeypatch: pytest.MonkeyPatch
) -> None:
    surgeon, seen, e = make(split_direction="loss", grown=True), list[Any](), 1
    original = hyperplanes.gradient_kernel

    def spy(moe: MoE, index: int, tokens: Tensor, gradients: Tensor) -> Tensor:
        seen.append((moe, index, tokens, gradients))
        return original(moe, index, tokens, gradients)

    monkeypatch.setattr(hyperplanes, "gradient_kernel", spy)
    moe = copy.deepcopy(surgeon.model.layers[block])
    layer = surgeon.model.layers[block]
    loss = F.cross_entropy(surgeon.model.eval()(surgeon.course.signal.x).logits[0], surgeon.course.signal.y)
    expected = [gradient[e] for gradient in torch.autograd.grad(loss, [layer.w_in, layer.w_out])]
    act(surgeon, block, Asked(nothing, Proposal("grow", e)))
    ((_, index, tokens, gradients),) = seen
    assert index == e
    before = (tokens @ moe.w_in[e]).detach()
    back = gradients @ moe.w_out[e].detach().T * (before > 0)
    found = [tokens.T @ back, before.relu().T @ gradients]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    direct = hyperplanes.loss_direction(tokens, original(moe, e, tokens, gradients).detach())
    torch.testing.assert_close(surgeon.model.layers[block].node_weight[-1].detach(), direct)
    assert not layer._forward_hooks and not surgeon.model.layers[block]._forward_hooks


def siblings(moe: MoE) -> dict[int, int]:
    """Pairs of leaves whose paths differ in the side of a single node, counted the slow way."""
    pairs = {}
    for a in range(moe.n_routed):
        for b in range(moe.n_routed):
            differ = (moe.path[a] != moe.path[b]).nonzero().flatten().tolist()
            if len(differ) == 1 and moe.path[a, differ[0]] * moe.path[b, differ[0]] == -1:
                pairs[a] = b
    return pairs


@pytest.mark.parametrize("block", BLOCKS)
def test_no_expert_without_a_sibling_leaf_is_merged(block: int, make: Callable[..., Surgeon]) -> None:
    surgeon = make(prune="merge", grown=True, cooldown=0, min_experts=1)
    merged = 0
    while True:
        moe = surgeon.model.layers[block]
        allowed = act(surgeon, block, Asked(lambda situation: situation.allowed.prune.nonzero().flatten().tolist()))
        pairs = siblings(moe)
        assert allowed == sorted(pairs)
        if not allowed:
            break
        e = allowed[merged % len(allowed)]
        gone, kept = int(moe.expert_id[e]), int(moe.expert_id[pairs[e]])
        act(surgeon, block, Asked(nothing, Proposal("prune", e)))
        assert (surgeon.log[-1]["operation"], surgeon.log[-1]["expert"], surgeon.log[-1]["parent"]) == (
            "merge", gone, kept,
        )  # fmt: skip
        merged += 1
    assert merged == 4 and surgeon.model.layers[block].n_routed == 5


def test_a_merge_weighs_both_by_their_signal_tokens(make: Callable[..., Surgeon]) -> None:
    surgeon = make(prune="merge", grown=True)
    moe, count = surgeon.model.layers[0], tokens_of(surgeon, 0)
    a, b = next(iter(siblings(moe).items()))
    share = float(count[a] / (count[a] + count[b]))
    assert abs(share - 0.5) > 0.01
    expected, kept = (share * moe.w_in[a] + (1 - share) * moe.w_in[b]).detach(), int(moe.expert_id[b])
    act(surgeon, 0, Asked(nothing, Proposal("prune", a)))
    moe = surgeon.model.layers[0]
    torch.testing.assert_close(moe.w_in[moe.expert_id == kept][0].detach(), expected)


def test_two_siblings_without_tokens_merge_in_equal_parts(make: Callable[..., Surgeon]) -> None:
    surgeon = make(prune="merge", grown=True)
    moe = surgeon.model.layers[0]
    a, b = next(iter(siblings(moe).items()))
    moe.selection_bias[:, moe.family_of[a]] = -1e3
    expected, kept = ((moe.w_in[a] + moe.w_in[b]) / 2).detach(), int(moe.expert_id[b])
    act(surgeon, 0, Asked(nothing, Proposal("prune", a)))
    moe = surgeon.model.layers[0]
    torch.testing.assert_close(moe.w_in[moe.expert_id == kept][0].detach(), expected)


def masks(situation: Situation) -> tuple[list[bool], list[bool]]:
    return situation.allowed.grow.tolist(), situation.allowed.prune.tolist()


def test_what_is_allowed_keeps_to_the_bounds(make: Callable[..., Surgeon]) -> None:
    yes, no = [True] * 5, [False] * 5
    assert act(make(min_experts=4, max_experts=6), 0, Asked(masks)) == (yes, yes)
    assert act(make(min_experts=4, max_experts=5), 0, Asked(masks)) == (no, yes)
    assert act(make(min_experts=5, max_experts=6), 0, Asked(masks)) == (yes, no)
    assert act(make(prune="merge"), 0, Asked(masks)) == (yes, no)


def test_experts_that_surgery_touched_rest_on_their_own_layer_only(make: Callable[..., Surgeon]) -> None:
    surgeon = make(cooldown=8)
    act(surgeon, 0, Asked(nothing, Proposal("grow", 2)), step=4)
    others = [True, True, False, True, True, False]
    assert act(surgeon, 0, Asked(masks), step=8) == (others, others)
    assert act(surgeon, 0, Asked(masks), step=12) == ([True] * 6, [True] * 6)
    assert act(surgeon, 1, Asked(masks), step=8) == ([True] * 5, [True] * 5)


def test_an_expert_is_not_merged_into_a_sibling_that_rests(make: Callable[..., Surgeon]) -> None:
    surgeon = make(prune="merge", grown=True, cooldown=8)  # expert 1's family is ((1 | 7) | (6 | 8))
    moe = surgeon.model.layers[0]
    for merged, step in ((7, 4), (8, 12)):
        act(surgeon, 0, Asked(nothing, Proposal("prune", moe.expert_id.tolist().index(merged))), step=step)
    for step, free in ((16, {0, 5}), (20, {0, 1, 5, 6})):
        _, prunable = act(surgeon, 0, Asked(masks), step=step)
        assert {e for e, may in zip(moe.expert_id.tolist(), prunable, strict=True) if may} == free


def test_as_many_families_stay_as_a_token_runs(make: Callable[..., Surgeon]) -> None:
    surgeon = make(min_experts=1, cooldown=0)
    act(surgeon, 0, Asked(nothing, Proposal("grow", 0)))
    for _ in range(3):
        act(surgeon, 0, Asked(nothing, Proposal("prune", 1)))
    assert act(surgeon, 0, Asked(masks))[1] == [True, False, True]  # the halves of one family, and an only member


def test_an_operation_is_noted_as_recovered_at_the_first_point_that_makes_it_good(make: Callable[..., Surgeon]) -> None:
    surgeon = make()
    before = 100 * correct(surgeon.model, surgeon.course.gate) / len(surgeon.course.gate)
    worst = max(range(5), key=lambda e: act(make(), 0, Asked(every_prune))[e])
    act(surgeon, 0, Asked(nothing, Proposal("prune", worst)))
    (row,) = surgeon.log
    assert row["accuracy_before"] == before > row["accuracy_after"]
    assert row["accuracy_after"] == 100 * correct(surgeon.model, surgeon.course.gate) / len(surgeon.course.gate)
    surgeon.recovered(8, before - 0.5)
    assert row["recovery_steps"] != row["recovery_steps"]
    for step in (12, 16):
        surgeon.recovered(step, before)
        assert row["recovery_steps"] == 8
