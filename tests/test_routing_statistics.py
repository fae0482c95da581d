"""Signals say what a loop over tokens would, and KL is zero exactly where routing did not change."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phasegate.model.moe import MoE, Routing, routing_entropy
from phasegate.model.routing_statistics import expert_signals, features, routing_kl
from phasegate.surgery.operations import ExpertManager, Surgery
from tests.models import seeds


def routed(seed: int, splits: int = 0, top_k: int = 2, n_routed: int = 5) -> tuple[MoE, Routing]:
    """A layer, some experts of which were split at random, and its routing of 40 tokens."""
    torch.manual_seed(seed)
    moe = MoE(8, n_routed, 4, top_k)
    for _ in range(splits):
        ExpertManager(moe).split(int(moe.expert_id[-1]), torch.randn(8), 0.0)
    return moe, route(moe, 2 * torch.randn(1, 40, 8))


def route(moe: MoE, x: torch.Tensor) -> Routing:
    with torch.no_grad():
        routing: Routing = moe(x)[1]
    return routing


@given(seeds, st.integers(0, 4), st.integers(1, 3))
def test_expert_signals_equal_a_loop_over_tokens(seed: int, splits: int, top_k: int) -> None:
    moe, routing = routed(seed, splits, top_k)
    found = expert_signals(routing, moe.n_routed)
    entropy = -(routing.probs[0] * routing.probs[0].log()).sum(-1) / torch.tensor(5.0).log()
    torch.testing.assert_close(found.batch_entropy, entropy.mean())
    for e in range(moe.n_routed):
        mine = [(n, k) for n in range(40) for k in range(top_k) if routing.experts[0, n, k] == e]
        tokens, count = [n for n, _ in mine], max(1, len(mine))
        gate = sum(routing.gates[0, n, k] for n, k in mine)
        torch.testing.assert_close(found.load[e], torch.tensor(len(mine) / (40 * top_k)))
        torch.testing.assert_close(found.gate[e], torch.as_tensor(gate / count, dtype=torch.float32))
        torch.testing.assert_close(found.entropy[e], entropy[tokens].sum() / count)
        torch.testing.assert_close(found.token[e], routing.tokens[0, tokens].sum(0) / count)
    assert features(found).shape == (moe.n_routed, 8 + 3)
    torch.testing.assert_close(features(found)[:, 8].mean(), torch.ones(()))  # load, relative to an even share


@given(seeds, st.integers(1, 9), st.sampled_from([0.0, 1.0, 100.0]))
def test_entropy_is_zero_for_certainty_and_one_for_indifference(seed: int, families: int, scale: float) -> None:
    torch.manual_seed(seed)
    entropy = routing_entropy((scale * torch.randn(20, families)).softmax(-1))
    assert entropy.shape == (20,) and (entropy >= 0).all() and (entropy <= 1 + 1e-6).all()
    if scale == 0:
        torch.testing.assert_close(entropy, torch.full((20,), float(families > 1)))
    assert not routing_entropy(torch.eye(families)).any()


def test_entropy_has_a_finite_gradient_where_a_probability_is_zero() -> None:
    scores, found = torch.tensor([[0.0, 1.0, -200.0, -90.0], [0.0, -300.0, -300.0, -300.0]]), []
    for dtype in (torch.float32, torch.float64):  # which underflows in neither
        logits = scores.to(dtype).requires_grad_()
        found.append(torch.autograd.grad(routing_entropy(logits.softmax(-1)).sum(), logits)[0])
    assert found[0].any()
    torch.testing.assert_close(*found, check_dtype=False, rtol=1e-4, atol=1e-6)


def kl(moe: MoE, before: Routing, surgery: Surgery) -> float:
    return routing_kl(before.probs[0], route(moe, before.tokens).probs[0], surgery.family_source)


@given(seeds, st.integers(0, 4))
def test_kl_is_zero_where_no_family_changes(seed: int, splits: int) -> None:
    moe, before = routed(seed, splits)
    assert routing_kl(before.probs[0], before.probs[0], tuple(range(5))) == 0
    surgery = ExpertManager(moe).split(2, torch.randn(8), 0.0)
    assert kl(moe, before, surgery) == 0
    assert kl(moe, route(moe, before.tokens), ExpertManager(moe).remove(surgery.expert)) == 0


@pytest.mark.parametrize("operation", ["clone", "remove", "reinit"])
@pytest.mark.parametrize("sharpness", [1.0, 100.0])
@given(seed=seeds)
def test_kl_is_positive_and_finite_where_families_come_or_go(operation: str, sharpness: float, seed: int) -> None:
    moe, _ = routed(seed)
    moe.router.data *= sharpness
    before = route(moe, torch.randn(1, 40, 8))
    manager = ExpertManager(moe)
    found = kl(moe, before, manager.reinit() if operation == "reinit" else getattr(manager, operation)(2))
    assert 0 <= found < 100 * sharpness and (found > 0 or sharpness > 1)


def test_kl_of_a_clone_and_of_its_removal_is_the_log_of_the_mass_that_moved() -> None:
    moe, before = routed(0)
    surgery = ExpertManager(moe).clone(1)
    expected = float((1 + before.probs[0, :, 1]).log().mean())
    cloned = route(moe, before.tokens)
    found = [kl(moe, before, surgery), kl(moe, cloned, ExpertManager(moe).remove(surgery.expert))]
    assert found == pytest.approx([expected] * 2, rel=1e-5)
