"""Planted truth: in layers built so that the answer is known, measurement finds it, and a head learns it."""

from typing import NamedTuple

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from phasegate.model.classifier import Model, ModelSpec
from phasegate.params.fields import override
from phasegate.params.phases import Schedule
from phasegate.params.pretraining import Training
from phasegate.signals import oracle
from phasegate.signals.features import CHANGES, FEATURES, Change, describe
from phasegate.signals.forks import estimate, removals
from phasegate.signals.predictor import CounterfactualHead, train_head
from phasegate.surgery.hyperplanes import halve, random_direction
from phasegate.surgery.probe import Probe
from phasegate.training.batches import Examples
from phasegate.training.course import Course
from phasegate.training.loop import make_optimizer
from tests.models import ARCHITECTURE, Forks, Operation, draws, removed

WIDTH, CASES, LESSONS = 16, 100, 30


class Planted(NamedTuple):
    """A model, examples, and where the useless, a duplicated and the indispensable expert of its layer stand."""

    model: Model
    examples: Examples
    order: tuple[int, int, int]


def planted(seed: int) -> Planted:
    """Each class has an expert that fires for it alone and writes what the head reads; the duplicated has a twin.

    Half of the width says which class a token is of, the other half is what the head reads: so that without an expert
    for its class a token tells nothing. The useless expert is chosen by the indispensable one's tokens, as their
    second choice, and writes nothing.
    """
    random = draws(seed)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=random)

    classes = int(torch.randint(4, 8, (), generator=random))
    n = classes + 2
    useless, indispensable, duplicated, twin, *others = torch.randperm(n, generator=random).tolist()
    serves = {indispensable: 0, duplicated: 1, twin: 1} | dict(zip(others, range(2, classes), strict=True))
    changes = {"blocks": 1, "n_routed": n, "top_k": 2, "dropout": 0.0, "balance_loss": 0.0, "balance_bias": 0.0}
    torch.manual_seed(seed)
    model = Model(ModelSpec(override(ARCHITECTURE, {**changes, "z_loss": 0.0}, ""), (1, WIDTH), (classes,)))
    moe, stem, head = model.layers[0], model.stem[1], model.heads[0]  # type: ignore[index]
    assert isinstance(stem, nn.Linear) and isinstance(head, nn.Linear)
    with torch.no_grad():
        stem.weight.copy_(torch.eye(WIDTH))
        for weights in (stem.bias, moe.router, moe.w_in, moe.w_out, head.weight, head.bias):
            torch.nn.init.zeros_(weights)
        moe.router[0].copy_(0.02 * torch.randn(n, WIDTH, generator=random))
        for expert, label in serves.items():
            moe.router[0, expert, label] += 0.35
            moe.w_in[expert, label] = between(0.2, 0.6, 8)
            moe.w_out[expert, :, WIDTH // 2 + label] = between(0.04, 0.08, 8)
        for weights in (moe.router[0], moe.w_in, moe.w_out):
            weights[twin] = weights[duplicated]
        moe.router[0, twin] += 0.01 * torch.randn(WIDTH, generator=random)
        moe.router[0, useless, 0] = 0.25
        moe.w_in[useless] = torch.randn(WIDTH, 8, generator=random)
        head.weight[range(classes), range(WIDTH // 2, WIDTH // 2 + classes)] = 1.5
    y = torch.arange(300) % classes
    x = torch.zeros(300, 1, WIDTH)
    x[:, 0, : WIDTH // 2] = between(0, 0.3, 300, WIDTH // 2)
    x[range(300), 0, y] += between(1, 2, 300)
    return Planted(model.eval(), Examples(x, y), (useless, duplicated, indispensable))


def test_the_oracle_and_the_measured_labels_rank_the_three_in_every_case() -> None:
    for model, examples, order in map(planted, range(CASES)):
        probe = Probe(model, 0, examples)
        sets, whole = oracle.losses_of_all_sets(probe), (1 << probe.layer.n_routed) - 1
        useless, duplicated, indispensable = (float(sets[whole & ~(1 << e)]) for e in order)
        assert useless < duplicated < indispensable
        useless, duplicated, indispensable = removals(probe).change[list(order)].tolist()
        assert useless < duplicated < indispensable


@pytest.fixture(scope="module")
def head(training: Training, schedule: Schedule) -> CounterfactualHead:
    """A head trained on measurements of layers that no other test sees."""
    return train_head(pd.concat(lesson(training, schedule, 1000 + n) for n in range(LESSONS)), 0)


def lesson(training: Training, schedule: Schedule, seed: int) -> pd.DataFrame:
    """Every expert's features, and what its removal changes, immediately and after some training; and one split's."""
    model, examples, _ = planted(seed)
    probe, ids = Probe(model, 0, examples), model.layers[0].expert_id.tolist()
    features, immediate = described(probe), removals(probe)
    course = Course(examples, examples, examples, training, schedule, seed)
    forks = Forks(model, make_optimizer(model.parameters(), training), course, steps=3, repeats=2)
    plane = halve(probe.tokens_of(0), random_direction(WIDTH, draws(seed)))
    operations: list[Operation] = [*map(removed, ids), lambda manager, draws: manager.split(0, *plane)]
    changes = estimate(forks.measure(0, 0, operations)[0])
    table = pd.DataFrame(features.numpy(), columns=list(FEATURES)).assign(seed=seed)
    for change, label in zip(CHANGES, (immediate, changes, changes), strict=True):
        table[change], table[f"{change}_error"] = (part[: len(ids)].numpy() for part in label)
    table.loc[1:, "grow"] = float("nan")
    table.loc[0, ["grow", "grow_error"]] = [float(part[-1]) for part in changes]
    return table


def described(probe: Probe) -> Tensor:
    return describe(probe, torch.full((probe.layer.n_routed,), 1000), progress=0)


def test_a_head_that_has_seen_other_layers_ranks_the_three_in_nine_of_ten_cases(head: CounterfactualHead) -> None:
    right = 0
    for model, examples, order in map(planted, range(CASES)):
        change = head.predict(described(Probe(model, 0, examples))).change[:, Change.PRUNE]
        useless, duplicated, indispensable = change[list(order)]
        right += bool(useless < duplicated < indispensable)
    assert right >= 90, right
