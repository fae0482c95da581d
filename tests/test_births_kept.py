"""A birth that is under way is part of checkpoints, copies and exported programs; an impossible one is refused."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import phasegate
from phasegate.base.errors import UserError
from phasegate.model.births import Birth
from phasegate.model.classifier import Model, ModelSpec
from phasegate.params.fields import override
from phasegate.surgery.operations import ExpertManager, grow_older
from phasegate.training import checkpoint
from phasegate.training.batches import Examples
from phasegate.training.loop import make_optimizer
from tests.models import ARCHITECTURE, draws
from tests.test_checkpoint import edit_weights
from tests.tiny_data import TRAINING


def growing_model(retires: bool, age: int = 30) -> tuple[Model, Optimizer]:
    torch.manual_seed(0)
    model = Model(ModelSpec(override(ARCHITECTURE, {"dropout": 0.0}, ""), (1, 8), (4,)))
    optimizer = make_optimizer(model.parameters(), TRAINING)
    for moe in model.layers:
        ExpertManager(moe, optimizer).split(0, torch.randn(16), 0.1)
    step(model, optimizer)
    ExpertManager(model.layers[1], optimizer).birth(4, retires, draws())
    for _ in range(age):
        grow_older(model.layers[1], optimizer)
    step(model, optimizer)
    return model, optimizer


def step(model: Model, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model.train()(torch.linspace(-1, 1, 256).view(32, 1, 8)).logits[0].square().sum().backward()
    optimizer.step()


def saved(folder: Path, model: Model, optimizer: Optimizer | None) -> Examples:
    gate = Examples(torch.randn(20, 1, 8, generator=draws()), torch.arange(20) % 4)
    record = checkpoint.Record(phase="p7c1", arm="birth", seed=0, training=TRAINING, n_routed_start=5)
    checkpoint.save(folder, model, optimizer, record, gate)
    return gate


@pytest.mark.parametrize("retires", [False, True])
def test_a_birth_is_part_of_checkpoints_and_copies(retires: bool, tmp_path: Path) -> None:
    model, optimizer = growing_model(retires)
    gate = saved(tmp_path, model, optimizer)
    loaded = checkpoint.load(tmp_path, gate)
    assert isinstance(loaded.model, Model) and loaded.optimizer
    others = [(loaded.model, loaded.optimizer), copy.deepcopy((model, optimizer))]
    outside = phasegate.load(tmp_path, None).model
    with torch.no_grad():
        assert torch.equal(outside.eval()(gate.x).logits[0], model.eval()(gate.x).logits[0])
    for layers in (outside.layers, *(other.layers for other, _ in others)):
        assert [moe.under_way for moe in layers] == [None, Birth(5, 30, retires)]
    for one, by in ((model, optimizer), *others):
        for _ in range(80):  # past its end
            step(one, by)
            grow_older(one.layers[1], by)
        assert one.layers[1].under_way is None
    for other, _ in others:
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "birth",
    [(-5, 3, 0), (9, 3, 0), (9, 3, 1), (1, 3, 0), (5, -3, 0), (5, 1000, 0), (5, 3, 7), (0, 3, 0), (5, 3), (5, 3, 0, 0)],
)
def test_a_checkpoint_with_an_impossible_birth_is_refused_in_one_sentence(birth: Any, tmp_path: Path) -> None:
    gate = saved(tmp_path, *growing_model(retires=False))
    edit_weights(tmp_path, lambda tensors: tensors.update({"model.blocks.1.moe.birth": torch.tensor(birth)}))
    for given_gate in (gate, None):
        with pytest.raises(UserError) as caught:
            checkpoint.load(tmp_path, given_gate)
        assert "\n" not in str(caught.value) and ("does not fit" in str(caught.value) or "shape" in str(caught.value))


@pytest.mark.parametrize("retires", [False, True])
def test_a_model_in_the_middle_of_a_birth_is_exported(retires: bool, tmp_path: Path) -> None:
    saved(tmp_path, growing_model(retires)[0], None)
    model = phasegate.load(tmp_path, None)
    x = torch.randn(30, 1, 8)
    program = torch.export.export(model, (x[:8],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file := io.BytesIO())
    torch.testing.assert_close(torch.export.load(file).module()(x), model(x))
