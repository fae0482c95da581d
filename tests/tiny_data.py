"""Write a prepared data set of 4 noisy classes, with two label maps, that a tiny model learns in a second."""

from pathlib import Path

import numpy as np

from phasegate.params.pretraining import Training
from phasegate.records.prepared import Split, save

TRAINING = Training(steps=60, batch=32, lr=0.01, warmup=5, weight_decay=0.01, label_smoothing=0, noise=0.1, shift=1)


def write_tiny_data(folder: Path, shape: tuple[int, ...] = (1, 8)) -> Path:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, *shape))
    splits = {}
    for name, examples in {"train": 320, "signal": 300, "gate": 200, "test": 100, "published": 40}.items():
        y = np.arange(examples) % 4
        splits[name] = Split(centres[y] + rng.normal(0, 0.8, (examples, *shape)), y)
    tasks = {"half": (0, 0, 1, 1), "parity": (0, 1, 0, 1)}
    moments = {"mean": (0.0,) * shape[0], "std": (1.0,) * shape[0]}
    save(folder, splits, name="tiny", class_names=("a", "b", "c", "d"), tasks=tasks, **moments)
    return folder
