"""Prepared data sets on disk: written by the stage `prepare`, read back and verified by the others.

The splits: *train* fits; *signal* (labels for controllers) and *gate* (choosing, stopping) are the halves of
validation; *test* is for evaluation only, and therefore in a file of its own.

Shapes: N examples, C channels; x is (N, C, L) or (N, C, H, W) in float32, y is (N,) in int64.
"""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from pydantic import FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError
from safetensors import SafetensorError

from phasegate.errors import UserError
from phasegate.files import sha256, write_atomic
from phasegate.memory import memory

Array = np.ndarray[Any, np.dtype[Any]]

FILES = {"fit.safetensors": ("train", "signal", "gate"), "test.safetensors": ("test",)}
LARGEST = memory() // 2  # bytes of arrays that are read at most: a file can claim any size
LARGEST_META = 1 << 24  # bytes of `dataset.json`: ours have thousands


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

    shape: tuple[NonNegativeInt, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True)
class Meta:
    """What `dataset.json` tells about a prepared data set."""

    name: str
    class_names: tuple[str, ...]  # "0", "1", … where the source has no names
    tasks: dict[str, tuple[NonNegativeInt, ...]]  # name -> task label of every class
    mean: tuple[FiniteFloat, ...]  # per channel: x = (source's value - mean) / std
    std: tuple[FiniteFloat, ...]
    arrays: dict[str, ArrayInfo]  # train_x, train_y, signal_x, … test_y

    def __post_init__(self) -> None:
        """Refuse arrays, tasks and moments that don't belong together (ValueError)."""
        if sorted(self.arrays) != sorted(key for file in FILES for key in _keys(file)):
            raise ValueError(f"its arrays are {sorted(self.arrays)}")
        if not (example := self.input_shape):
            raise ValueError(f"train_x has shape {self.arrays['train_x'].shape}")
        for key, info in self.arrays.items():
            rows = self.arrays[f"{key[:-2]}_y"].shape[:1]
            shape, dtype = ((*rows, *example), "float32") if key.endswith("x") else (rows, "int64")
            if (info.shape, info.dtype) != (shape, dtype):
                raise ValueError(f"{key} has shape {info.shape} in {info.dtype}, not {shape} in {dtype}")
        lengths = {"mean": (self.mean, example[0]), "std": (self.std, example[0])}
        lengths |= {f"task {name!r}": (labels, self.classes) for name, labels in self.tasks.items()}
        for what, (values, length) in lengths.items():
            if len(values) != length:
                raise ValueError(f"{what} has {len(values)} values, not {length}")

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
    for file in FILES:
        if (size := sum(arrays[key].nbytes for key in _keys(file))) > LARGEST:
            raise UserError(
                f"{name} takes {size:,} bytes in {file}, in float32: this machine, with half of its memory for data, "
                f"can read {LARGEST:,}"
            )
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
        return TypeAdapter(Meta).validate_json(_sized(path, LARGEST_META).read_bytes(), strict=True)
    except OSError as error:
        raise _unusable(path, error) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise _unusable(path, f"{key!r}: {message}" if key else message) from None


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
    path, meta = folder / file, load_meta(folder)
    try:
        arrays = safetensors.numpy.load_file(_sized(path, LARGEST))
    except (OSError, SafetensorError) as error:
        raise _unusable(path, error) from error
    for key in _keys(file):
        if key not in arrays or _info(arrays[key]) != meta.arrays[key]:
            raise _unusable(path, f"{key} is not the array that dataset.json describes")
    for split in FILES[file]:
        y = arrays[f"{split}_y"]
        if len(y) and not 0 <= y.min() <= y.max() < meta.classes:
            raise _unusable(path, f"{split}_y has labels from {y.min()} to {y.max()}, not 0..{meta.classes - 1}")
    return {split: Split(arrays[f"{split}_x"], arrays[f"{split}_y"]) for split in FILES[file]}


def _sized(path: Path, largest: int) -> Path:
    """The path, if it is a file of at most so many bytes; OSError otherwise."""
    if not path.is_file():
        raise OSError("there is no such file")
    if (size := path.stat().st_size) > largest:
        raise OSError(f"it has {size:,} bytes")
    return path


def _unusable(path: Path, why: object) -> UserError:
    reason = textwrap.shorten(str(why), 200, placeholder=" …")
    return UserError(f"{path} is missing or damaged ({reason}): get it back with `dvc repro prepare`")


def _keys(file: str) -> list[str]:
    return [f"{split}_{part}" for split in FILES[file] for part in "xy"]


def _info(array: Array) -> ArrayInfo:
    return ArrayInfo(array.shape, str(array.dtype), sha256(array.data))
