"""An expert is dead if it was there at the last point of the curve and ran no token since."""

import pandas as pd
import pytest
import torch

from phasegate.model.classifier import Model, ModelSpec
from phasegate.model.references import Reference, ReferenceSpec
from phasegate.surgery.operations import ExpertManager
from phasegate.training.batches import Examples
from phasegate.training.curves import Curve

NEVER = -1e3


class Study:
    """A model whose training is only its forward passes, and its curve."""

    def __init__(self, spec: ModelSpec, gate: Examples) -> None:
        torch.manual_seed(0)
        self.model, self.gate = Model(spec), gate
        self.curve = Curve(self.model, gate)
        self.steps = 0
        self.curve.measure(0)

    def interval(self) -> int:
        """Dead experts of an interval with two steps."""
        for _ in range(2):
            self.model.train()(self.gate.x)
            self.curve.add_loss(torch.tensor(1.0))
            self.steps += 1
        self.curve.measure(self.steps)
        return int(self.curve.points[-1]["dead_experts"])

    def shun(self, *families: int, bias: float = NEVER) -> None:
        """Let no token of the first block choose these families any more (or let them again)."""
        self.model.layers[0].selection_bias[:, list(families)] = bias


@pytest.fixture
def study(spec: ModelSpec, gate: Examples) -> Study:
    return Study(spec, gate)


def test_an_expert_without_a_token_in_an_interval_is_dead_only_in_it(study: Study) -> None:
    assert study.interval() == 0
    study.shun(1, 3)
    assert study.interval() == 2
    study.shun(3, bias=0.0)
    assert study.interval() == 1
    study.shun(1, bias=0.0)
    assert study.interval() == 0


def test_a_single_token_keeps_an_expert_alive(study: Study) -> None:
    study.shun(0)
    study.model.layers[0].load[0] = 1
    assert [study.interval(), study.interval()] == [0, 1]


def test_the_start_is_no_interval(study: Study) -> None:
    assert study.curve.points[0]["dead_experts"] == 0
    study.shun(0)
    study.curve.measure(0)
    assert study.curve.points[-1]["dead_experts"] == 0 and study.interval() == 1


def test_dead_experts_of_all_blocks_are_counted(study: Study) -> None:
    study.shun(0)
    study.model.layers[1].selection_bias[:, :2] = NEVER
    assert study.interval() == 3


@pytest.mark.parametrize("operation", ["split", "clone", "reinit"])
def test_an_expert_born_in_an_interval_is_not_dead_in_it(operation: str, study: Study) -> None:
    manager = ExpertManager(study.model.layers[0])
    if operation == "split":
        manager.split(2, torch.eye(16)[0], -1e6)  # no token lies on the new side
    else:
        _ = manager.clone(2) if operation == "clone" else manager.reinit()
        study.shun(5)
    assert [study.interval(), study.interval()] == [0, 1]


def test_an_expert_that_is_gone_is_not_dead(study: Study) -> None:
    study.shun(1)
    ExpertManager(study.model.layers[0]).remove(1)
    assert study.interval() == 0


def test_an_expert_that_lost_its_tokens_to_its_new_half_dies_an_interval_later(study: Study) -> None:
    study.model.train()(study.gate.x)
    ExpertManager(study.model.layers[0]).split(2, torch.eye(16)[0], 1e6)  # all tokens lie on the new side
    assert [study.interval(), study.interval()] == [0, 1]


def test_points_hold_mean_loss_accuracy_and_experts(study: Study) -> None:
    for loss in (1.0, 2.0):
        study.curve.add_loss(torch.tensor(loss))
    right = study.curve.measure(7)
    table, _ = study.curve.tables()
    assert table["step"].tolist() == [0, 7] and pd.isna(table["loss"][0]) and table["loss"][1] == 1.5
    assert (table["accuracy"] == 100 * right / 200).all() and (table["n_routed"] == 10).all()
    assert table["routing_entropy"].between(0, 1).all()


def test_a_reference_has_no_experts_to_die(gate: Examples) -> None:
    curve = Curve(Reference(ReferenceSpec((1, 8), 4, (), None)), gate)
    curve.add_loss(torch.tensor(1.0))
    curve.measure(1)
    assert (curve.points[0]["dead_experts"], curve.points[0]["n_routed"]) == (0, 0)
    assert pd.isna(curve.points[0]["routing_entropy"])
