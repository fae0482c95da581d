"""A probe says of a layer what a loop over its tokens would, and leaves the model as it was."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phasegate.expert_manager import ExpertManager
from phasegate.model import Model, ModelSpec
from phasegate.moe import Routing
from phasegate.pretraining_params import Architecture
from phasegate.probe import Probe
from phasegate.sections import override
from phasegate.training import EVALUATION_BATCH, Examples

cases = st.fixed_dictionaries(
    {"stem": st.sampled_from(["mlp", "conv"]), "top_k": st.integers(1, 3), "n_shared": st.integers(0, 1)}
)


def study(architecture: Architecture, seed: int, examples: int = 20, **changes: int | str) -> tuple[Model, Examples]:
    """A random model of two blocks in float64, an expert of each split, and random examples."""
    torch.manual_seed(seed)
    model = Model(ModelSpec(override(architecture, changes, ""), (1, 8), (4,))).double()
    for moe in model.layers:
        moe.selection_bias.normal_()
        ExpertManager(moe).split(1, torch.randn(16).double(), 0.0)
        moe.w_out.data += 0.1 * torch.randn_like(moe.w_out)
    return model, Examples(torch.randn(examples, 1, 8).double(), torch.randint(0, 4, (examples,)))


def loss_with(model: Model, block: int, examples: Examples, change: Tensor) -> Tensor:
    """The mean loss if `change` (N, D) is added to what the layer puts out."""

    def add(layer: object, given: object, output: tuple[Tensor, Routing]) -> tuple[Tensor, Routing]:
        return output[0] + change, output[1]

    with model.layers[block].register_forward_hook(add), torch.no_grad():
        return F.cross_entropy(model.eval()(examples.x).logits[0], examples.y)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), case=cases, block=st.integers(0, 1))
def test_visits_and_contributions_equal_a_loop_and_add_up_to_the_layer(
    architecture: Architecture, seed: int, case: dict[str, Any], block: int
) -> None:
    model, examples = study(architecture, seed, **case)
    probe = Probe(model, block, examples)
    moe, (tokens, _, _, gates, experts) = model.layers[block], probe.routing
    assert probe.length == (2 if case["stem"] == "conv" else 1) and tokens.shape[1] == 20 * probe.length
    torch.testing.assert_close(tokens, model.blocks[block].norm(probe.stream))  # type: ignore[operator]
    visits, runs = torch.zeros_like(probe.visits), [[] for _ in range(6)]  # type: ignore[var-annotated]
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
@given(seed=st.integers(0, 10**6), case=cases, block=st.integers(0, 1))
def test_slopes_say_how_the_loss_changes_with_what_the_layer_puts_out(
    architecture: Architecture, seed: int, case: dict[str, Any], block: int
) -> None:
    model, examples = study(architecture, seed, **case)
    for moe in model.layers:  # trained hyperplanes would add what teaches them, which is no change of the loss
        moe.node_weight.requires_grad_(False)
        moe.node_offset.requires_grad_(False)
    with torch.no_grad():  # as where controllers ask
        probe = Probe(model, block, examples)
        slopes, nudge = probe.slopes, 1e-7 * torch.randn_like(probe.slopes)  # too small to change any routing
    torch.testing.assert_close(probe.losses.mean(), loss_with(model, block, examples, 0 * nudge))
    up, down = (loss_with(model, block, examples, sign * nudge) for sign in (1, -1))
    assert abs((up - down) / 2 - (slopes * nudge).sum()) < 1e-5 * slopes.norm() * nudge.norm()


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), block=st.integers(0, 1))
def test_a_probe_leaves_weights_gradients_and_hooks_as_they_were(
    architecture: Architecture, seed: int, block: int
) -> None:
    model, examples = study(architecture, seed)
    F.cross_entropy(model(examples.x).logits[0], examples.y).backward()  # type: ignore[no-untyped-call]
    before, held = copy.deepcopy(model), [parameter.grad for parameter in model.parameters()]
    grads = copy.deepcopy(held)
    probe = Probe(model, block, examples)
    assert len(probe.losses) == 20 and probe.contributions.any() and probe.slopes.any() and probe.visits.any()
    for (name, was), now in zip(before.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(was, now), name
    for parameter, grad, was in zip(model.parameters(), held, grads, strict=True):
        assert parameter.requires_grad and parameter.grad is grad
        assert grad is None or (was is not None and torch.equal(grad, was))
    assert sum(grad is not None for grad in held) > 10
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    results = (probe.losses, probe.stream, probe.contributions, probe.slopes, probe.visits, probe.routing.probs)
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("examples", [EVALUATION_BATCH, EVALUATION_BATCH + 1])
def test_a_probe_is_of_one_batch_at_most(architecture: Architecture, examples: int) -> None:
    model, split = study(architecture, 0, examples)
    probe = Probe(model, 1, split)
    assert len(probe.examples) == len(probe.losses) == probe.stream.shape[1] == len(probe.slopes) == EVALUATION_BATCH
    expected = model(split.x).logits[0][:EVALUATION_BATCH]
    torch.testing.assert_close(
        probe.losses, F.cross_entropy(expected, split.y[:EVALUATION_BATCH], reduction="none").detach()
    )
