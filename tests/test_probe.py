"""A probe says of a layer what a loop over its tokens would, and leaves the model as it was."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from phasegate.model.classifier import Model
from phasegate.surgery.hyperplanes import Direction, cut
from phasegate.surgery.operations import ExpertManager
from phasegate.surgery.probe import Probe
from phasegate.training.batches import Examples
from phasegate.training.predictions import EVALUATION_BATCH
from tests.models import cases, draws, loss_with, random_model, seeds, split, unchanged

blocks = st.integers(0, 1)


def study(seed: int, examples: int = 20, **changes: int | str) -> tuple[Model, Examples]:
    """A random model, an expert of each of its layers split, and random examples."""
    model, drawn = random_model(seed, examples, **changes)
    for moe in model.layers:
        split(moe, 1)
    return model, drawn


@settings(max_examples=25)
@given(seeds, cases, blocks)
def test_visits_and_contributions_equal_a_loop(seed: int, case: dict[str, Any], block: int) -> None:
    model, examples = study(seed, **case)
    probe = Probe(model, block, examples)
    moe, (tokens, _, _, gates, experts) = model.layers[block], probe.routing
    assert probe.length == (2 if case["stem"] == "conv" else 1) and tokens.shape[1] == 20 * probe.length
    torch.testing.assert_close(tokens, model.blocks[block].norm(probe.stream))  # type: ignore[operator]
    visits, runs = torch.zeros_like(probe.visits), [list[Tensor]() for _ in range(6)]
    for n in range(tokens.shape[1]):
        for k in range(moe.top_k):
            e = int(experts[0, n, k])
            visits[n, e] = gates[0, n, k]
            runs[e].append(tokens[0, n])
            torch.testing.assert_close(probe.contributions[n, k], gates[0, n, k] * moe.run(e, tokens[0, n]))
    assert torch.equal(probe.visits, visits) and probe.visits.shape[1] == moe.n_routed == len(runs)
    for e, mine in enumerate(runs):
        assert torch.equal(probe.tokens_of(e), torch.stack(mine) if mine else tokens.new_zeros(0, 16))
    torch.testing.assert_close(probe.per_expert(gates[0]), visits.sum(0))
    shared = (tokens @ moe.shared_in).relu() @ moe.shared_out if moe.n_shared else 0
    torch.testing.assert_close(probe.contributions.sum(1)[None] + shared, moe(tokens)[0])


@settings(max_examples=15)
@given(seeds, cases, blocks)
def test_slopes_say_how_the_loss_changes_with_the_output(seed: int, case: dict[str, Any], block: int) -> None:
    model, examples = study(seed, **case)
    for moe in model.layers:  # trained hyperplanes would add what teaches them, which is no change of the loss
        moe.node_weight.requires_grad_(False)
        moe.node_offset.requires_grad_(False)
    with torch.no_grad():  # as where controllers ask
        probe = Probe(model, block, examples)
        slopes, nudge = probe.slopes, 1e-7 * torch.randn_like(probe.slopes)  # too small to change any routing
        up, down = (loss_with(probe, sign * nudge) for sign in (1, -1))
    torch.testing.assert_close(probe.losses.mean(), loss_with(probe, 0 * nudge))
    assert abs((up - down) / 2 - (slopes * nudge).sum()) < 1e-5 * slopes.norm() * nudge.norm()


@settings(max_examples=10)
@given(seeds, blocks)
def test_a_probe_leaves_the_model_as_it_was(seed: int, block: int) -> None:
    model, examples = study(seed)
    F.cross_entropy(model(examples.x).logits[0], examples.y).backward()  # type: ignore[no-untyped-call]
    with unchanged(model):
        probe = Probe(model, block, examples)
        assert len(probe.losses) == 20 and probe.contributions.any() and probe.slopes.any() and probe.visits.any()
    results = (probe.losses, probe.stream, probe.contributions, probe.slopes, probe.visits, probe.routing.probs)
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("examples", [EVALUATION_BATCH, EVALUATION_BATCH + 1])
def test_a_probe_is_of_one_batch_at_most(examples: int) -> None:
    model, drawn = study(0, examples)
    probe = Probe(model, 1, drawn)
    assert len(probe.examples) == len(probe.losses) == probe.stream.shape[1] == len(probe.slopes) == EVALUATION_BATCH
    losses = F.cross_entropy(model(drawn.x).logits[0], drawn.y, reduction="none")[:EVALUATION_BATCH]
    torch.testing.assert_close(probe.losses, losses.detach())


@settings(max_examples=25)
@given(seeds, st.integers(2, 3), st.integers(0, 4))
def test_a_copys_share_is_what_both_get_once_there_are_two(seed: int, top_k: int, e: int) -> None:
    model, examples = random_model(seed, 50, top_k=top_k)
    moe = model.layers[1]
    moe.selection_bias.zero_()
    probe = Probe(model, 1, examples)
    share, own = probe.share_of_copy(e), probe.visits[:, e].sum()
    ExpertManager(moe).clone(e)
    both = Probe(model, 1, examples).visits[:, [e, -1]].sum()
    assert share == pytest.approx(float(both / own) / 2 if own else 0.5)


def test_of_a_lone_choice_a_copy_gets_half() -> None:
    model, examples = random_model(0, 50, top_k=1)
    assert {round(Probe(model, 1, examples).share_of_copy(e), 6) for e in range(5)} == {0.5}


@settings(max_examples=25)
@given(seeds, st.integers(0, 4), st.sampled_from(["random", "principal", "loss"]))
@example(72, 3, "random")  # an expert with a single token
@torch.no_grad()  # as where the surgeon acts
def test_a_cuts_share_is_that_of_the_new_halfs_tokens(seed: int, e: int, direction: Direction) -> None:
    model, examples = random_model(seed, 50)
    probe = Probe(model, 0, examples)
    normal, offset, share = cut(probe, e, direction, draws(seed))
    count = len(probe.tokens_of(e))
    ExpertManager(model.layers[0]).split(e, normal, offset, share)
    assert share == (len(Probe(model, 0, examples).tokens_of(5)) + 1) / (count + 2)
