"""Prepared data sets on disk: written by the stage `prepare`, read back and verified by the others.

The splits: *train* fits; *signal* (labels for controllers) and *gate* (choosing, stopping) are the halves of
validation; *test* is for evaluation only, and therefore in a file of its own.

Shapes: N examples, C channels; x is (N, C, L) or (N, C, H, W) in float32, y is (N,) in int64.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from phasegate.errors import UserError
from phasegate.files import sha256, write_atomic

Array = np.ndarray[Any, np.dtype[Any]]

FILES = {"fit.safetensors": ("train", "signal", "gate"), "test.safetensors": ("test",)}


@dataclass(frozen=True, eq=False)
class Split:
    """Examples and their labels: x (N, C, ...) and y (N,)."""

    x: Array
    y: Array

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Fit:
    """The splits that training stages may see."""

    train: Split
    signal: Split
    gate: Split


@dataclass(frozen=True)
class ArrayInfo:
    """What an array must be when it is read back."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True)
class Meta:
    """What `dataset.json` tells about a prepared data set."""

    name: str
    class_names: tuple[str, ...]  # "0", "1", … where the source has no names
    tasks: dict[str, tuple[int, ...]]  # name -> task label of every class
    mean: tuple[float, ...]  # per channel: x = (source's value - mean) / std
    std: tuple[float, ...]
    arrays: dict[str, ArrayInfo]  # train_x, train_y, signal_x, … test_y

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example: (C, L) or (C, H, W)."""
        return self.arrays["train_x"].shape[1:]

    @property
    def splits(self) -> dict[str, int]:
        """Number of examples in each split."""
        return {split: self.arrays[f"{split}_y"].shape[0] for splits in FILES.values() for split in splits}


def save(
    folder: Path,
    splits: Mapping[str, Split],
    *,
    name: str,
    class_names: tuple[str, ...],
    tasks: Mapping[str, tuple[int, ...]],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Write the splits train, signal, gate and test, and `dataset.json` with the fields of `Meta`."""
    arrays = {f"{key}_x": np.ascontiguousarray(split.x, np.float32) for key, split in splits.items()}
    arrays |= {f"{key}_y": np.ascontiguousarray(split.y, np.int64) for key, split in splits.items()}
    infos = {key: _info(arrays[key]) for file in FILES for key in _keys(file)}
    meta = Meta(name, class_names, dict(tasks), mean, std, infos)
    for file in FILES:
        write_atomic(folder / file, safetensors.numpy.save({key: arrays[key] for key in _keys(file)}))
    derived = {"classes": meta.classes, "input_shape": meta.input_shape, "splits": meta.splits}
    write_atomic(meta_file(folder), json.dumps(asdict(meta) | derived, indent=2) + "\n")


def load_meta(folder: Path) -> Meta:
    """Read `dataset.json` of a prepared data set; UserError if it is missing or damaged."""
    path = meta_file(folder)
    try:
        content = json.loads(path.read_text())
        arrays = {key: content["arrays"][key] for file in FILES for key in _keys(file)}
        return Meta(
            name=content["name"],
            class_names=tuple(content["class_names"]),
            tasks={name: tuple(labels) for name, labels in content["tasks"].items()},
            mean=tuple(content["mean"]),
            std=tuple(content["std"]),
            arrays={
                key: ArrayInfo(tuple(info["shape"]), info["dtype"], info["sha256"]) for key, info in arrays.items()
            },
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(path, error) from error


def fit_file(folder: Path) -> Path:
    """The file of all that training may see; its content decides whether a kept trial is still good."""
    return folder / "fit.safetensors"


def meta_file(folder: Path) -> Path:
    """The file that describes all arrays, the test split's too: training reads it, but must not depend on it."""
    return folder / "dataset.json"


def load_fit(folder: Path) -> Fit:
    """Read train, signal and gate; UserError if anything is missing or differs from what `prepare` wrote."""
    return Fit(**_load(folder, "fit.safetensors"))


def load_test(folder: Path) -> Split:
    """Read the test split (for evaluation only); UserError as in `load_fit`."""
    return _load(folder, "test.safetensors")["test"]


def _load(folder: Path, file: str) -> dict[str, Split]:
    path, expected = folder / file, load_meta(folder).arrays
    try:
        arrays = safetensors.numpy.load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unusable(path, error) from error
    for key in _keys(file):
        if key not in arrays or _info(arrays[key]) != expected[key]:
            raise _unusable(path, f"{key} is not the array that dataset.json describes")
    return {split: Split(arrays[f"{split}_x"], arrays[f"{split}_y"]) for split in FILES[file]}


def _unusable(path: Path, why: object) -> UserError:
    return UserError(f"{path} is missing or damaged ({why}): get it back with `dvc repro prepare`")


def _keys(file: str) -> list[str]:
    return [f"{split}_{part}" for split in FILES[file] for part in "xy"]


def _info(array: Array) -> ArrayInfo:
    return ArrayInfo(array.shape, str(array.dtype), sha256(array.data))
