"""A table of features is read as channels of length one: each in its own unit, none mixed with its neighbours."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import phasegate
from phasegate.data_sets.prepare import prepare
from phasegate.evaluation.evaluate import evaluate_phase
from phasegate.model.classifier import ModelSpec
from phasegate.model.references import ReferenceSpec, Spec
from phasegate.params.pretraining import Architecture, Training
from phasegate.pretraining.pretrain import pretrain
from phasegate.records.prepared import FIT, load_meta, load_splits
from phasegate.training.batches import augment, load_examples

UNITS = 10.0 ** np.arange(-3, 4)  # of seven features


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's table, whose classes differ in every feature; prepared."""
    folder, draws = tmp_path_factory.mktemp("table"), np.random.default_rng(0)
    y = np.arange(600) % 3
    x = (draws.normal(0, 3, (3, 7))[y] + draws.normal(size=(600, 7)) + 5) * UNITS
    np.savez(folder / "own.npz", x_train=x[:500], y_train=y[:500], x_test=x[500:], y_test=y[500:])
    prepare("npz", folder / "data/prepared", folder / "own.npz", 200, 0, {"first": [1, 0, 0]})
    return folder


def test_every_feature_has_a_mean_and_a_deviation_of_its_own(table: Path) -> None:
    meta, x = load_meta(table / "data/prepared"), load_splits(table / "data/prepared" / FIT)["train"].x
    assert meta.input_shape == (7, 1) and len(meta.mean) == len(meta.std) == 7
    np.testing.assert_allclose([x.mean((0, 2)), x.std((0, 2))], [[0] * 7, [1] * 7], atol=1e-6)


def test_no_feature_is_shifted_into_another(table: Path) -> None:
    x = load_examples(table / "data/prepared", torch.device("cpu"))[0].x
    assert torch.equal(augment(x, 4, 0.0, torch.Generator().manual_seed(0)), x)


@pytest.mark.parametrize("model", ["mlp", "conv", "perceptron", "convolutional network"])
def test_every_model_learns_is_evaluated_loads_and_is_exported(
    table: Path, tmp_path: Path, architecture: Architecture, training: Training, model: str
) -> None:
    spec: Spec = ReferenceSpec((7, 1), 3, *{"perceptron": ((12,), None)}.get(model, (None, (8, 8))))
    if model in ("mlp", "conv"):
        spec = ModelSpec(architecture.model_copy(update={"stem": model}), (7, 1), (3,))
    prepared, folder = table / "data/prepared", tmp_path / "models/arm/seed-0"
    folder.mkdir(parents=True)
    longer = training.model_copy(update={"steps": 200})
    pretrain(folder, prepared=prepared, phase="p7a", arm="arm", seed=0, spec=spec, training=longer)
    evaluate_phase(tmp_path / "models", prepared, tmp_path / "evaluated")
    accuracy = pd.read_csv(tmp_path / "evaluated/trials.csv")["accuracy"].item()
    assert accuracy > 90
    loaded = phasegate.load(folder, prepared)
    with np.load(table / "own.npz") as own:
        x, y = torch.from_numpy(own["x_test"]).unsqueeze(-1), torch.from_numpy(own["y_test"])
    assert 100 * (loaded.predict(x) == y).double().mean() == pytest.approx(accuracy)
    program = torch.export.export(loaded, (x[:8],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, file := io.BytesIO())
    torch.testing.assert_close(torch.export.load(file).module()(x), loaded(x))
