"""Every signal is what a slow loop over experts and tokens makes it, and asking changes nothing."""

from statistics import fmean, variance
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phasegate.model.routing_statistics import expert_signals
from phasegate.signals.published import PUBLISHED, Scores, random_labels
from phasegate.surgery.probe import Probe
from tests.models import cases, draws, loss_with, random_model, seeds, split, unchanged

UNUSED = 2  # an expert that no token chooses


def study(seed: int, **changes: Any) -> Probe:
    """Of a random layer with an unused expert and, in the family of another, three siblings."""
    model, examples = random_model(seed, **changes)
    split(model.layers[0], 1, 1)
    model.layers[0].selection_bias[0] = torch.eye(5)[UNUSED] * -1e3
    return Probe(model, 0, examples)


def say(signal: str, probe: Probe) -> Scores:
    return PUBLISHED[signal](probe, draws())


def both(signal: str, probe: Probe) -> Tensor:
    """The scores of a signal that says the same of removals and of splits."""
    prune, grow, recovered = say(signal, probe)
    assert prune is not None and grow is not None and torch.equal(prune, grow) and recovered is None
    return prune


def slope_of(probe: Probe, of: Tensor, added: Tensor) -> Tensor:
    """By autograd, the gradient of the mean loss by `of`, on which what is `added` (N, D) to the output depends."""
    return torch.autograd.grad(loss_with(probe, added), of)[0]


@settings(max_examples=25)
@given(seeds, cases)
def test_signals_equal_a_loop_over_experts_and_their_tokens(seed: int, case: dict[str, Any]) -> None:
    probe = study(seed, **case)
    moe, (tokens, _, _, gates, experts) = probe.layer, probe.routing
    reap, weights, hits = (torch.zeros(7).double() for _ in range(3))
    for e in range(7):
        mine = [(n, k) for n in range(tokens.shape[1]) for k in range(moe.top_k) if experts[0, n, k] == e]
        weights[e] = sum(float(weight[e].detach().square().sum()) for weight in (moe.w_in, moe.w_out)) ** 0.5
        hits[e] = bool(mine)
        norms = [float(gates[0, n, k] * moe.run(e, tokens[0, n]).detach().norm()) for n, k in mine]
        reap[e] = sum(norms) / max(len(mine), 1)
    signals = expert_signals(probe.routing, 7)  # which a test of their own compares with such a loop
    torch.testing.assert_close(both("usage_frequency", probe), signals.load)
    torch.testing.assert_close(both("routing_entropy", probe), -signals.entropy)
    torch.testing.assert_close(both("gate_times_norm", probe), reap)
    torch.testing.assert_close(both("weight_norm", probe), weights)
    prune, grow, _ = say("zero_hits", probe)
    assert prune is not None and grow is None and torch.equal(prune.double(), hits) and not prune[UNUSED]


@settings(max_examples=15)
@given(seeds, cases)
def test_signals_of_bare_outputs_and_of_weights_follow_their_definitions(seed: int, case: dict[str, Any]) -> None:
    probe = study(seed, **case)
    moe, tokens, runs = probe.layer, probe.routing.tokens[0], probe.routing.experts[0]
    for e in range(7):
        outputs = [moe.run(e, token).tolist() for token, mine in zip(tokens, runs, strict=True) if e in mine]
        squares = [sum(value**2 for value in output) for output in outputs]
        assert float(both("mean_squared_norm", probe)[e]) == pytest.approx(fmean(squares or [0]))
        assert float(both("mean_norm", probe)[e]) == pytest.approx(fmean([square**0.5 for square in squares] or [0]))
        spread = sum(map(variance, zip(*outputs, strict=True))) ** 0.5 if len(outputs) > 1 else 0
        assert float(both("frequency_times_spread", probe)[e]) == pytest.approx(len(outputs) / runs.numel() * spread)
        weights = moe.weights(e).tolist()
        aimer = fmean(map(abs, weights)) / fmean(weight**2 for weight in weights) ** 0.5
        assert float(both("aimer", probe)[e]) == pytest.approx(-aimer)


@settings(max_examples=15)
@given(seeds, cases)
def test_gradient_squared_is_that_of_the_whole_models_loss(seed: int, case: dict[str, Any]) -> None:
    probe = study(seed, **case)
    moe, (x, y) = probe.layer, (probe.examples.x, probe.examples.y)
    gradients = torch.autograd.grad(F.cross_entropy(probe.model(x).logits[0], y), (moe.w_in, moe.w_out))
    found = both("gradient_squared", probe)
    for e in range(7):
        assert float(found[e]) == pytest.approx(sum(float((gradient[e] ** 2).sum()) for gradient in gradients))
    assert found[UNUSED] == 0 and found.any()


def test_a_dead_expert_is_last_by_every_new_signal_but_aimer_which_knows_no_size() -> None:
    probe = study(0)
    moe = probe.layer
    with torch.no_grad():
        moe.w_in[0], moe.w_out[0] = 0, 0
        before = both("aimer", probe)[1:]
        for weights in (moe.w_in, moe.w_out):
            weights.mul_(3)
    assert both("aimer", probe)[0] == 0 > both("aimer", probe)[1:].max()
    torch.testing.assert_close(both("aimer", probe)[1:], before)
    for signal in ("mean_norm", "mean_squared_norm", "gradient_squared", "frequency_times_spread"):
        assert both(signal, probe)[0] == 0 < both(signal, probe).max()


@settings(max_examples=15)
@given(seeds, cases)
def test_taylor_saliency_is_how_the_loss_answers_to_each_contribution(seed: int, case: dict[str, Any]) -> None:
    probe = study(seed, **case)
    factors = torch.ones(probe.routing.gates[0].shape, dtype=torch.float64, requires_grad=True)  # (N, K)
    answers = slope_of(probe, factors, ((factors - 1)[:, :, None] * probe.contributions).sum(1))
    saliency = torch.zeros(7).double()
    for e, answer in zip(probe.routing.experts[0].flatten().tolist(), answers.flatten(), strict=True):
        saliency[e] += answer.abs()
    found = both("taylor_saliency", probe)
    torch.testing.assert_close(found, saliency)
    assert found[UNUSED] == 0 and found.any()


@settings(max_examples=15)
@given(seeds, cases)
def test_gradmax_is_the_largest_gradient_that_a_new_hidden_unit_can_get(seed: int, case: dict[str, Any]) -> None:
    probe = study(seed, **case)
    none, scores, _ = say("gradmax", probe)
    assert none is None and scores is not None and scores.shape == (7,) and scores[UNUSED] == 0
    for e, score in enumerate(scores):
        gate, x = ((probe.routing.experts[0] == e).double() * probe.routing.gates[0]).sum(1), probe.routing.tokens[0]

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
def test_a_signal_scores_every_expert_and_leaves_the_model_as_it_was(signal: str, seed: int, block: int) -> None:
    probe = study(seed)
    model, probe.block = probe.model, block
    F.cross_entropy(model(probe.examples.x).logits[0], probe.examples.y).backward()  # type: ignore[no-untyped-call]
    with unchanged(model):
        said = [scores for scores in say(signal, probe) if scores is not None]
    assert said and not any(scores.requires_grad for scores in said)
    assert all(scores.shape == (probe.layer.n_routed,) and scores.isfinite().all() for scores in said)


@settings(max_examples=10)
@given(seeds)
def test_the_control_draws_its_scores_and_looks_at_nothing(seed: int) -> None:
    one, other = (study(s) for s in (0, 1))
    prune, grow, _ = random_labels(one, draws(seed))
    assert prune is not None and grow is not None and not torch.equal(prune, grow)
    again, _, _ = random_labels(other, draws(seed))
    assert again is not None and torch.equal(prune, again) and len(set(prune.tolist())) == 7
    assert next(iter(PUBLISHED)) == "random_labels"
