"""A step of training depends on the seed and its number alone, and every part of the loss is what it says."""

import ast
import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from phasegate.model.classifier import Model, ModelSpec
from phasegate.model.moe import Routing
from phasegate.params.pretraining import Training
from phasegate.training.batches import Batches, Examples, augment
from phasegate.training.loop import cosine, fit
from phasegate.training.losses import Objective, load_balance, nudge_selection, router_z, shares
from phasegate.training.randomness import derived_seed, generator
from tests.small_study import ROOT

seeds = st.integers(0, 10**6)
CONFIGURATION = Training(steps=10, batch=5, lr=0.1, warmup=0, weight_decay=0, label_smoothing=0, noise=0.3, shift=2)
KEYS = """
7b | augmentation _ | batches _ | control head | dead _ | decision _ _ | dropout _ | fork _ _ | fork _ _ _ | in a row
initial weights | labels _ | survey _ _ | task heads | time of growth | tried _ | yoked _ | _ _
"""
"""What follows the seed in the keys of all random draws. Another key is another draw, and so another result."""


def test_the_keys_of_random_draws_stay_as_they_are() -> None:
    nodes = [node for path in (ROOT / "phasegate").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    keys = {
        " ".join(str(part.value) if isinstance(part, ast.Constant) else "_" for part in node.args[1:])
        for node in nodes
        if isinstance(node, ast.Call) and re.search(r"\b(derived_seed|generator)$", ast.unparse(node.func))
    }
    assert keys - {""} == {key.strip() for key in re.split(r"[|\n]", KEYS.strip())}
    assert derived_seed(3, "batches", 7) == generator(3, "batches", 7).initial_seed() == 2340979241270011656


def numbered(count: int) -> Examples:
    """Examples whose label is their number, and whose values lie near it."""
    y = torch.arange(count)
    return Examples(y.float().view(-1, 1, 1).expand(-1, 1, 6).contiguous(), y)


@given(seeds, st.integers(1, 8), st.integers(1, 6))
def test_batches_cover_every_example_once_per_epoch(seed: int, size: int, count: int) -> None:
    examples = numbered(size * count)
    batches, again = (Batches(examples, size, seed, CONFIGURATION) for _ in range(2))
    orders = []
    for epoch in range(2):
        drawn = [batches(epoch * count + step) for step in range(1, count + 1)]
        orders.append(torch.cat([y for _, y in drawn]).tolist())
        assert sorted(orders[-1]) == list(range(size * count))
        for step, (x, y) in enumerate(drawn, start=epoch * count + 1):
            assert (x.mean((1, 2)) - y).abs().max() < 1.5
            assert all(map(torch.equal, again(step), (x, y)))
    assert orders[0] != orders[1] or size * count < 10


def test_the_draws_of_a_batch_stay_as_they_are() -> None:
    x, y = Batches(numbered(23), 4, 0, CONFIGURATION)(25)
    assert y.tolist() == [1, 12, 9, 4]
    wanted = torch.tensor([1.0843, 0.7219, 1.2751, 0.6299, 0.9126, 0.7582])
    torch.testing.assert_close(x[0, 0], wanted, atol=1e-4, rtol=0)


def test_another_seed_draws_other_batches_and_a_batch_is_at_most_the_data_set() -> None:
    one, other = (Batches(numbered(20), 20, seed, CONFIGURATION)(1)[1].tolist() for seed in (0, 1))
    assert one != other and sorted(one) == sorted(other)
    batches = Batches(numbered(1), 1, 0, CONFIGURATION)
    assert not torch.equal(batches(1)[0], batches(2)[0])  # augmented anew
    assert len(Batches(numbered(3), 64, 0, CONFIGURATION)(7)[1]) == 3


@given(seeds, st.integers(1, 60), st.lists(st.integers(1, 60), max_size=4))
def test_the_batch_of_a_step_does_not_depend_on_earlier_batches(seed: int, step: int, earlier: list[int]) -> None:
    resumed, undisturbed = (Batches(numbered(23), 4, seed, CONFIGURATION) for _ in range(2))
    for other in earlier:
        resumed(other)
    torch.manual_seed(seed)
    assert all(map(torch.equal, resumed(step), undisturbed(step)))


@given(seeds, st.integers(0, 7), st.sampled_from([(1, 9), (2, 7, 5)]))
def test_augmentation_is_a_circular_shift_by_at_most_shift(seed: int, shift: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(20, *shape, generator=torch.Generator().manual_seed(seed))
    shifted = augment(x, shift, 0.0, torch.Generator().manual_seed(seed))
    axes = list(range(1, len(shape)))
    ways = torch.cartesian_prod(*[torch.arange(-shift, shift + 1)] * len(axes)).view(-1, len(axes)).tolist()
    for before, after in zip(x, shifted, strict=True):
        assert any(torch.equal(before.roll(way, axes), after) for way in ways)


def test_augmentation_uses_every_shift_and_adds_noise_of_the_stated_size() -> None:
    x = torch.eye(9)[[0] * 500].unsqueeze(1)
    assert set(augment(x, 2, 0.0, torch.Generator().manual_seed(0)).argmax(-1).flatten().tolist()) == {0, 1, 2, 7, 8}
    noise = augment(x, 0, 0.3, torch.Generator().manual_seed(0)) - x
    assert abs(noise.std().item() - 0.3) < 0.02 and abs(noise.mean().item()) < 0.02


@given(st.floats(1e-6, 10), st.integers(1, 300), st.data())
def test_learning_rates_rise_to_the_peak_and_fall_to_nearly_zero(peak: float, steps: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    rates = cosine(peak, steps, warmup)
    assert len(rates) == steps and all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    for step, (rate, following) in enumerate(pairwise(rates), start=1):
        assert (following > rate * (1 - 1e-12)) if step <= warmup else (following < rate)
    assert rates[warmup] == peak and rates[-1] <= peak * max(2.5 / (steps - warmup) ** 2, float(steps == warmup + 1))


def fit_to(model: nn.Linear, objective: Objective, rates: list[float], after: Callable[[int, Tensor], None]) -> None:
    """Plain gradient descent; the bias at half the learning rate."""
    groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias], "lr_factor": 0.5}]
    fit(model, torch.optim.SGD(groups, lr=9.0), Batches(numbered(10), 5, 0, CONFIGURATION), objective, rates, after)


def test_a_loss_that_is_not_finite_stops_the_training_at_its_step() -> None:
    model, seen = nn.Linear(6, 1), list[int]()

    def objective(x: Tensor, y: Tensor, step: int) -> Tensor:
        loss: Tensor = model(x).square().mean() * (math.nan if step == 3 else 1e-3)
        return loss

    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 3$"):
        fit_to(model, objective, [1e-3] * 5, lambda step, loss: seen.append(step))
    assert seen == [1, 2]


def test_every_step_and_every_group_has_its_own_learning_rate() -> None:
    model = nn.Linear(1, 1)
    values: list[list[float]] = [[model.weight.item(), model.bias.item()]]

    def objective(x: Tensor, y: Tensor, step: int) -> Tensor:
        return model.weight.sum() + model.bias.sum()

    fit_to(model, objective, [0.5, 0.25], lambda *_: values.append([model.weight.item(), model.bias.item()]))
    torch.testing.assert_close(-torch.tensor(values).diff(dim=0), torch.tensor([[0.5, 0.25], [0.25, 0.125]]))


def routing(families: Tensor, probs: Tensor) -> Routing:
    return Routing(probs, probs.log(), families, torch.ones_like(families), families)


@given(seeds, st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))
def test_load_balance_is_one_for_even_routing_and_f_for_a_single_family(
    seed: int, families: int, rounds: int, gates: int
) -> None:
    torch.manual_seed(seed)
    probs = torch.randn(gates, rounds * families, families).softmax(-1)
    even = torch.arange(rounds * families).view(1, -1, 1).expand(gates, -1, 1) % families
    torch.testing.assert_close(shares(routing(even, probs)), torch.full((gates, families), 1 / families))
    torch.testing.assert_close(load_balance(routing(even, probs)), torch.tensor(float(gates)))
    single = torch.zeros_like(probs).index_fill(-1, torch.tensor(0), 1.0)
    found = load_balance(routing(torch.zeros_like(even), single))
    torch.testing.assert_close(found, torch.tensor(float(gates * families)))


@pytest.mark.parametrize("loss", [load_balance, router_z])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_gate_is_balanced_as_hard_with_others_as_alone(loss: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 20, 5, dtype=dtype, requires_grad=True)
    families = logits.argsort(-1)[..., :2]
    slopes = [
        torch.autograd.grad(loss(Routing(logits, logits[:g], families[:g], logits, families)), logits)[0][0]
        for g in (1, 3)
    ]
    assert slopes[0].any() and torch.equal(*slopes)


def test_router_z_is_zero_for_a_unit_partition_and_grows_with_the_scores() -> None:
    logits = torch.full((1, 4, 5), -math.log(5))
    made = routing(torch.zeros(1, 4, 1, dtype=torch.int64), logits.exp())
    assert router_z(made).item() == pytest.approx(0, abs=1e-10)
    assert router_z(made._replace(logits=logits + 3)).item() == pytest.approx(9, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_nudging_the_selection_evens_out_the_load_and_leaves_the_probabilities(spec: ModelSpec, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Model(spec).eval(), torch.randn(300, 1, 8)
    start = model(x).routings[0]
    for _ in range(1_000):
        nudge_selection(model, model(x))
    end = model(x).routings[0]
    spread = [(shares(made) - 1 / 5).abs().max().item() for made in (start, end)]
    assert spread[1] < spread[0] / 3 and torch.equal(start.probs, end.probs)
