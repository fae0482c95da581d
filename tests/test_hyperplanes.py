"""A cut halves its tokens in any direction, and the directions are what their names say."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from phasegate.model.moe import MoE, Routing
from phasegate.surgery import hyperplanes
from phasegate.surgery.hyperplanes import gradient_kernel, halve, loss_direction, principal_direction, random_direction
from phasegate.surgery.operations import ExpertManager
from tests.models import draws, seeds

DIRECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "any": lambda tokens: torch.randn(8) * 10 ** float(torch.randn(())),
    "axis": lambda tokens: torch.eye(8)[3],
    "random": lambda tokens: random_direction(8, draws(len(tokens))),
    "principal": principal_direction,
    "loss": lambda tokens: loss_direction(tokens, (slopes := torch.randn(len(tokens), 5)) @ slopes.T),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@given(seed=seeds, equal=st.integers(0, 20), others=st.integers(0, 41), scale=st.sampled_from([1e-3, 1.0, 1e3]))
@example(seed=0, equal=0, others=0, scale=1.0)
@example(seed=0, equal=0, others=1, scale=1.0)
@example(seed=0, equal=0, others=2, scale=1.0)
def test_a_cut_halves_even_equal_tokens(direction: str, seed: int, equal: int, others: int, scale: float) -> None:
    torch.manual_seed(seed)
    tokens = scale * (torch.cat([torch.randn(1, 8).expand(equal, -1), torch.randn(others, 8)]) + torch.randn(8))
    normal, offset = halve(tokens, DIRECTIONS[direction](tokens))
    torch.testing.assert_close(normal.norm(), torch.ones(()))
    margins, rounding = (tokens.double() @ normal.double() + offset) / scale, 1e-5
    for side in (margins, -margins):
        assert side.gt(rounding).sum() <= (len(tokens) + 1) // 2 and side.gt(-rounding).sum() >= len(tokens) // 2
    assert math.isfinite(offset) and (len(tokens) > 0 or offset == 0)


@pytest.mark.parametrize("count", range(2, 9))
def test_no_token_lies_on_the_cut(count: int) -> None:
    tokens = torch.arange(count).float()[torch.randperm(count)][:, None] * torch.eye(8)[0]
    normal, offset = halve(tokens, torch.eye(8)[0])
    assert (tokens @ normal + offset).abs().min() == 0.5


@given(seeds, st.integers(2, 30))
def test_the_principal_direction_is_that_of_the_largest_variance_whatever_its_sign(seed: int, count: int) -> None:
    torch.manual_seed(seed)
    tokens = torch.randn(count, 8) * torch.arange(1, 9) + 3
    principal = principal_direction(tokens)
    others = F.normalize(torch.randn(100, 8), dim=1)
    assert (tokens @ principal).var() >= (tokens @ others.T).var(0).max() * (1 - 1e-5)
    torch.testing.assert_close(principal_direction(-tokens), principal, atol=1e-4, rtol=1e-4)


def test_random_directions_are_uniform_and_come_from_the_generator_alone() -> None:
    many, again = (torch.stack([random_direction(8, random) for _ in range(2_000)]) for random in (draws(), draws()))
    assert torch.equal(many, again)
    torch.testing.assert_close(many.norm(dim=1), torch.ones(2_000))
    assert many.mean(0).norm() < 0.06
    torch.testing.assert_close(many.T @ many / 2_000, torch.eye(8) / 8, atol=0.02, rtol=0)


@settings(max_examples=30)
@given(seeds, st.integers(1, 3), st.integers(0, 3))
def test_the_kernel_is_that_of_gradients_taken_one_token_at_a_time(seed: int, top_k: int, splits: int) -> None:
    moe = grown(seed, splits, top_k=top_k)
    x, slopes = torch.randn(2, 40, 8, dtype=torch.float64)  # slopes: of the loss with respect to the output
    routing = moe(x[None])[1]
    e = int(torch.randint(moe.n_routed, ()))
    slot = routing.experts[0] == e
    ran = slot.any(-1)
    kernel = gradient_kernel(moe, e, x[ran], routing.gates[0][slot][:, None] * slopes[ran])

    gradients = torch.zeros(int(ran.sum()), moe.w_in[e].numel() + moe.w_out[e].numel(), dtype=torch.float64)
    for row, token, slope in zip(gradients, x[ran], slopes[ran], strict=True):
        of_weights = torch.autograd.grad((moe(token[None, None])[0] * slope).sum(), [moe.w_in, moe.w_out])
        row.copy_(torch.cat([gradient[e].flatten() for gradient in of_weights]))
    torch.testing.assert_close(kernel, gradients @ gradients.T, rtol=1e-12, atol=1e-12)


@given(seeds, st.integers(200, 400), st.booleans())
def test_the_loss_direction_finds_what_parts_the_gradients(seed: int, count: int, double: bool) -> None:
    torch.manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(8, 8)).Q
    planted = axes[:, 1]
    tokens = torch.randn(count, 8) * torch.tensor([4.0, 1, 1, 1, 1, 1, 1, 1]) @ axes.T + torch.randn(8)
    if double:
        tokens, planted = tokens.double(), planted.double()
    side = halve(tokens, planted)
    gradients = (tokens @ side[0] + side[1]).sign()[:, None] * torch.randn(20) + 0.1 * torch.randn(count, 20)
    kernel = gradients @ gradients.T

    def disagreement(direction: Tensor) -> float:
        normal, offset = halve(tokens, direction)
        sides = (tokens @ normal + offset).sign().to(kernel)
        return float(sides @ kernel @ sides)

    found, principal = loss_direction(tokens, kernel), principal_direction(tokens)
    assert found.dtype == tokens.dtype
    assert (found @ planted).abs() > 0.9 > 0.5 > (principal @ planted).abs()
    random = draws(seed)
    others = [principal, *(random_direction(8, random).to(tokens) for _ in range(10))]
    assert disagreement(found) >= max(disagreement(other) for other in others)


def grown(seed: int, splits: int, families: int = 3, top_k: int = 2, gates: int = 1) -> MoE:
    """A layer whose experts were split by random hyperplanes, in float64."""
    torch.manual_seed(seed)
    moe = MoE(8, families, 4, top_k, n_gates=gates).double()
    for _ in range(splits):
        direction = 0.3 * torch.randn(8).double()
        ExpertManager(moe).split(int(torch.randint(moe.n_routed, ())), direction, 0.3 * float(torch.randn(())))
    return moe


@torch.no_grad()
def slow_balance(moe: MoE, routing: Routing) -> float:
    """Token by token and node by node."""
    total = 0.0
    for node in range(moe.path.shape[1]):
        sides, chances = [], []
        for token, chosen in zip(routing.tokens.flatten(0, 1), routing.experts.flatten(0, 1).tolist(), strict=True):
            for expert in chosen:
                if moe.path[expert, node]:
                    sides.append(float(moe.path[expert, node] > 0))
                    chances.append(float((moe.node_weight[node] @ token + moe.node_offset[node]).sigmoid()))
        if not sides:
            continue
        share, chance = (sum(values) / len(values) for values in (sides, chances))
        total += 2 * (share * chance + (1 - share) * (1 - chance))
    return total


@settings(max_examples=30)
@given(seeds, st.integers(0, 6), st.integers(1, 3), st.integers(1, 2))
def test_sibling_balance_is_what_its_slow_definition_says(seed: int, splits: int, top_k: int, gates: int) -> None:
    moe = grown(seed, splits, top_k=top_k, gates=gates)
    routing = moe(torch.randn(gates, 60, 8, dtype=torch.float64))[1]
    assert hyperplanes.sibling_balance(moe, routing).item() == pytest.approx(slow_balance(moe, routing), abs=1e-6)


@pytest.mark.parametrize("sign", [-1, 1])
@given(seeds)
def test_sibling_balance_pushes_an_uneven_hyperplane_towards_even_shares(sign: int, seed: int) -> None:
    moe = grown(seed, 0, families=1, top_k=1)
    x = torch.randn(400, 8, dtype=torch.float64)
    ExpertManager(moe).split(0, random_direction(8, draws(seed)).double(), sign * 1.0)
    hyperplane, smaller = [moe.node_weight, moe.node_offset], list[int]()
    for _ in range(4):
        routing = moe(x[None])[1]
        smaller.append(int((routing.experts == (sign < 0)).sum()))
        gradients = torch.autograd.grad(hyperplanes.sibling_balance(moe, routing), hyperplane)
        with torch.no_grad():
            for parameter, gradient in zip(hyperplane, gradients, strict=True):
                parameter.sub_(0.5 * gradient)
    assert smaller == sorted(set(smaller)) and smaller[-1] < 200
