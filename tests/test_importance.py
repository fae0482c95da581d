"""Every signal is what a slow loop over experts and tokens makes it, and asking changes nothing."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phasegate.expert_manager import ExpertManager
from phasegate.importance import PUBLISHED, Scores, random_labels
from phasegate.model import Model, ModelSpec
from phasegate.moe import Routing
from phasegate.pretraining_params import Architecture
from phasegate.probe import Probe
from phasegate.sections import override
from phasegate.training import Examples

UNUSED = 2  # an expert that no token chooses
seeds = st.integers(0, 10**6)
cases = st.fixed_dictionaries(
    {"stem": st.sampled_from(["mlp", "conv"]), "top_k": st.integers(1, 3), "n_shared": st.integers(0, 1)}
)


def study(architecture: Architecture, seed: int, **changes: int | str) -> Probe:
    """Of a random layer in float64 with an unused expert and, in the family of another, three siblings."""
    torch.manual_seed(seed)
    model = Model(ModelSpec(override(architecture, changes, ""), (1, 8), (4,))).double()
    for expert in (1, 1):
        ExpertManager(model.layers[0]).split(expert, torch.randn(16).double(), 0.0)
    model.layers[0].w_out.data += 0.1 * torch.randn_like(model.layers[0].w_out)
    model.layers[0].selection_bias[0, UNUSED] = -1e3
    return Probe(model, 0, Examples(torch.randn(20, 1, 8).double(), torch.randint(0, 4, (20,))))


def say(signal: str, probe: Probe) -> Scores:
    return PUBLISHED[signal](probe, torch.Generator().manual_seed(0))


def both(signal: str, probe: Probe) -> Tensor:
    """The scores of a signal that says the same of removals and of splits."""
    prune, grow = say(signal, probe)
    assert prune is not None and grow is not None and torch.equal(prune, grow)
    return prune


def slope_of(probe: Probe, of: Tensor, added: Tensor) -> Tensor:
    """By autograd, the gradient of the mean loss by `of`, on which what is `added` (N, D) to the output depends."""

    def add(layer: object, given: object, output: tuple[Tensor, Routing]) -> tuple[Tensor, Routing]:
        return output[0] + added, output[1]

    with probe.layer.register_forward_hook(add):
        loss = F.cross_entropy(probe.model.eval()(probe.examples.x).logits[0], probe.examples.y)
        return torch.autograd.grad(loss, of)[0]


@settings(max_examples=25)
@given(seeds, cases)
def test_signals_equal_a_loop_over_experts_and_their_tokens(
    architecture: Architecture, seed: int, case: dict[str, Any]
) -> None:
    probe = study(architecture, seed, **case)
    moe, (tokens, _, _, gates, experts), probs = probe.layer, probe.routing, probe.routing.probs
    entropy = -(probs[0] * probs[0].log()).sum(-1) / torch.tensor(5.0).double().log()
    load, unsure, reap, weights, hits = (torch.zeros(7).double() for _ in range(5))
    for e in range(7):
        mine = [(n, k) for n in range(len(entropy)) for k in range(moe.top_k) if experts[0, n, k] == e]
        load[e] = len(mine) / (len(entropy) * moe.top_k)
        weights[e] = sum(float(weight[e].detach().square().sum()) for weight in (moe.w_in, moe.w_out)) ** 0.5
        hits[e] = bool(mine)
        if mine:
            unsure[e] = sum(float(entropy[n]) for n, _ in mine) / len(mine)
            norms = [float(gates[0, n, k] * moe.run(e, tokens[0, n]).detach().norm()) for n, k in mine]
            reap[e] = sum(norms) / len(mine)
    torch.testing.assert_close(both("usage_frequency", probe), load)
    torch.testing.assert_close(both("routing_entropy", probe), -unsure)
    torch.testing.assert_close(both("gate_times_norm", probe), reap)
    torch.testing.assert_close(both("weight_norm", probe), weights)
    prune, grow = say("zero_hits", probe)
    assert prune is not None and grow is None and torch.equal(prune.double(), hits) and not prune[UNUSED]


@settings(max_examples=15)
@given(seeds, cases)
def test_taylor_saliency_is_how_the_loss_answers_to_each_contribution(
    architecture: Architecture, seed: int, case: dict[str, Any]
) -> None:
    probe = study(architecture, seed, **case)
    factors = torch.ones(probe.routing.gates[0].shape, dtype=torch.float64, requires_grad=True)  # (N, K)
    answers = slope_of(probe, factors, ((factors - 1)[:, :, None] * probe.contributions).sum(1))
    saliency = torch.zeros(7).double()
    for e, answer in zip(probe.routing.experts[0].flatten().tolist(), answers.flatten(), strict=True):
        saliency[e] += answer.abs()
    found = both("taylor_saliency", probe)
    torch.testing.assert_close(found, saliency)
    assert found[UNUSED] == 0 and (found > 0).sum() >= 2


@settings(max_examples=15)
@given(seeds, cases)
def test_gradmax_is_the_largest_gradient_that_a_new_hidden_unit_can_get(
    architecture: Architecture, seed: int, case: dict[str, Any]
) -> None:
    probe = study(architecture, seed, **case)
    none, scores = say("gradmax", probe)
    assert none is None and scores is not None and scores.shape == (7,) and scores[UNUSED] == 0
    for e, score in enumerate(scores):
        runs = (probe.routing.experts[0] == e).double()
        gate, x = (runs * probe.routing.gates[0]).sum(1), probe.routing.tokens[0]

        def reached(out: Tensor, gate: Tensor = gate, x: Tensor = x) -> Tensor:
            """The gradient of the weights into a linear unit, still zero, whose weights out are `out` (D,)."""
            into = torch.zeros(16, dtype=torch.float64, requires_grad=True)
            return slope_of(probe, into, (gate * (x @ into))[:, None] * out)

        outs = [F.normalize(torch.randn(16).double(), dim=0) for _ in range(3)]
        assert all(reached(out).norm() <= score + 1e-12 for out in outs)
        loop = sum((g * torch.outer(s, t) for g, s, t in zip(gate, probe.slopes, x, strict=True)), torch.zeros(16, 16))
        left, values, _ = torch.linalg.svd(loop)
        torch.testing.assert_close(score, values[0])
        torch.testing.assert_close(reached(left[:, 0]).norm(), score)


@pytest.mark.parametrize("signal", PUBLISHED)
@settings(max_examples=5)
@given(seed=seeds, block=st.integers(0, 1))
def test_a_signal_scores_every_expert_and_leaves_the_model_as_it_was(
    architecture: Architecture, signal: str, seed: int, block: int
) -> None:
    probe = study(architecture, seed)
    model, probe.block = probe.model, block
    F.cross_entropy(model(probe.examples.x).logits[0], probe.examples.y).backward()  # type: ignore[no-untyped-call]
    held = [parameter.grad for parameter in model.parameters()]
    before, grads = copy.deepcopy(model.state_dict()), copy.deepcopy(held)
    said = [scores for scores in say(signal, probe) if scores is not None]
    assert said and all(
        scores.shape == (probe.layer.n_routed,) and scores.isfinite().all() and not scores.requires_grad
        for scores in said
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter, grad, was in zip(model.parameters(), held, grads, strict=True):
        assert parameter.requires_grad and parameter.grad is grad
        assert grad is None or (was is not None and torch.equal(grad, was))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@settings(max_examples=10)
@given(seeds)
def test_the_control_draws_its_scores_and_looks_at_nothing(architecture: Architecture, seed: int) -> None:
    one, other = (study(architecture, s) for s in (0, 1))
    prune, grow = random_labels(one, torch.Generator().manual_seed(seed))
    assert prune is not None and grow is not None and not torch.equal(prune, grow)
    again, _ = random_labels(other, torch.Generator().manual_seed(seed))
    assert again is not None and torch.equal(prune, again) and len(set(prune.tolist())) == 7
    assert next(iter(PUBLISHED)) == "random_labels"
