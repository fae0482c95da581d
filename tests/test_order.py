"""Nothing that looks at the first examples of a split sees how the source was sorted."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from phasegate.data_sets.prepare import prepare
from phasegate.params.fields import override
from phasegate.params.phases import GroundTruth, Schedule
from phasegate.records.prepared import Array
from phasegate.signals import published, survey
from phasegate.signals.predictor import SURVEY
from phasegate.surgery import probe
from phasegate.training.batches import load_examples
from phasegate.training.course import Course, load_start
from tests.models import draws


def test_a_sorted_source_changes_signals_and_surveys_no_more_than_another_shuffle(
    tmp_path: Path, prepared: Path, baselines: Path, schedule: Schedule, truth: GroundTruth,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(probe, "EVALUATION_BATCH", 128)  # a quarter of signal and of gate, so one of four classes
    y = np.arange(1624) // 406
    x = np.random.default_rng(0).normal(size=(4, 1, 8))[y]  # centres of the data that the model knows
    x += np.random.default_rng(1).normal(0, 0.8, x.shape)

    def measured(folder: Path, order: Array) -> Array:
        """Return what is said of each expert if the source lists its examples in this order."""
        folder.mkdir()
        np.savez(folder / "own.npz", x_train=x[order], y_train=y[order], x_test=x, y_test=y)
        prepare("npz", folder, folder / "own.npz", 1024, 0, {"half": [0, 0, 1, 1]})
        model, optimizer, known = load_start(prepared, baselines / "seed-0", 0, schedule)
        course = Course(*load_examples(folder, torch.device("cpu")), known.training, schedule, 0)
        monkeypatch.setattr(survey, "load_start", lambda *_: (model, optimizer, course))
        probes = [probe.Probe(model, block, course.signal) for block in (0, 1)]
        scores = [score for signal in published.PUBLISHED.values() for p in probes for score in signal(p, draws())]
        values = [score.numpy() for score in scores if score is not None]
        once = override(truth, {"surveys": 1}, "p7b4")
        survey.survey(folder, prepared=folder, start=folder, seed=0, schedule=schedule, truth=once, steps=0)
        table = pd.read_csv(folder / SURVEY).drop(columns=["seed", "step", "block", "expert"]).fillna(0)
        return np.concatenate([*values, table.to_numpy(float).ravel()])

    orders = [np.random.default_rng(seed).permutation(len(y)) for seed in range(5)]
    shuffles = np.array([measured(tmp_path / str(number), order) for number, order in enumerate(orders)])
    away, usual = np.abs(measured(tmp_path / "sorted", np.arange(len(y))) - shuffles.mean(0)), shuffles.std(0, ddof=1)
    varies = usual > 1e-9
    assert varies.sum() > 200 and away[~varies].max() < 1e-9  # such as norms of weights, which see no example
    assert np.median(away[varies] / usual[varies]) < 1.2  # in standard deviations over shuffles
