"""Write prepared data sets, and read and verify them.

The splits: *train* fits models; *signal* (labels for controllers) and *gate* (choosing, stopping) are the halves of
validation; *test* is for evaluation only. *published* is the published test split where *test* is a larger one, else
empty. Each is in random order and stratified, so that its first examples stand for all.

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

from phasegate.base import used
from phasegate.base.errors import UserError, first_finding
from phasegate.base.files import sha256, write_atomic
from phasegate.base.memory import memory

Array = np.ndarray[Any, np.dtype[Any]]

META, FIT, TEST = "dataset.json", "fit.safetensors", "test.safetensors"
"""The description of all arrays, which training may read but not depend on; training's splits; evaluation's split."""
FILES = {FIT: ("train", "signal", "gate"), TEST: ("test", "published")}
ARRAYS = {file: [f"{split}_{part}" for split in splits for part in "xy"] for file, splits in FILES.items()}
LARGEST = memory() // 2  # bytes of arrays in a file: a file can claim any size
FLOAT32 = np.finfo(np.float32)
LARGEST_META = 1 << 24  # bytes of `dataset.json`, which has thousands


@dataclass(frozen=True, eq=False)
class Split:
    """Hold examples x (N, C, ...) and their labels y (N,)."""

    x: Array
    y: Array

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class ArrayInfo:
    """Describe an array, which must be the same when it is read back."""

    shape: tuple[NonNegativeInt, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True)
class Meta:
    """Describe a prepared data set: the content of `dataset.json`."""

    name: str
    class_names: tuple[str, ...]  # "0", "1", … where the source has no names
    tasks: dict[str, tuple[NonNegativeInt, ...]]  # name -> task label of every class
    mean: tuple[FiniteFloat, ...]  # per channel: x = (source's value - mean) / std
    std: tuple[FiniteFloat, ...]
    arrays: dict[str, ArrayInfo]  # train_x, train_y, signal_x, … published_y

    def __post_init__(self) -> None:
        if sorted(self.arrays) != sorted(key for keys in ARRAYS.values() for key in keys):
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
        for mean, std in zip(self.mean, self.std, strict=True):
            if not (std >= FLOAT32.tiny and abs(mean) <= std * float(FLOAT32.max)):
                limits = "std must be at least 1.2e-38, and mean at most 3.4e38 times it, to be computed in float32"
                raise UserError(f"mean {mean} with std {std}: {limits}")  # for `save`: they may be of people's own data

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Return the shape of one example: (C, L) or (C, H, W)."""
        return self.arrays["train_x"].shape[1:]

    @property
    def splits(self) -> dict[str, int]:
        """Return the number of examples in each split."""
        return {split: self.arrays[f"{split}_y"].shape[0] for splits in FILES.values() for split in splits}


def save(folder: Path, splits: Mapping[str, Split], **described: Any) -> None:
    """Write the splits that `FILES` names, and `dataset.json`; `described` are the other fields of `Meta`."""
    arrays = {f"{key}_x": np.ascontiguousarray(split.x, np.float32) for key, split in splits.items()}
    arrays |= {f"{key}_y": np.ascontiguousarray(split.y, np.int64) for key, split in splits.items()}
    infos = {key: _describe(arrays[key]) for keys in ARRAYS.values() for key in keys}
    meta = Meta(**described, arrays=infos)
    for file, keys in ARRAYS.items():
        write_atomic(folder / file, safetensors.numpy.save({key: arrays[key] for key in keys}))
    derived = {"classes": meta.classes, "input_shape": meta.input_shape, "splits": meta.splits}
    write_atomic(folder / META, json.dumps(asdict(meta) | derived, indent=2) + "\n")


def check_memory(what: str, values: int, stored: int) -> None:
    """Raise `UserError` if memory is too small for values in their stored bytes, as float32, and while `save` writes.

    It writes copies of copies, so each value is there three times as float32.
    """
    if (needed := stored + 12 * values) > (most := LARGEST * 3 // 2):
        said = f"{what} holds {values:,} values, and preparing them takes {needed:,} bytes"
        raise UserError(f"{said}: three quarters of this machine's memory are {most:,}")


def load_meta(folder: Path) -> Meta:
    """Read `dataset.json` of a prepared data set, or raise `UserError` if it is missing or damaged."""
    path = folder / META
    try:
        return TypeAdapter(Meta).validate_json(_check_size(path, LARGEST_META).read_bytes(), strict=True)
    except OSError as error:
        raise _unusable(path, error) from error
    except ValidationError as error:
        raise _unusable(path, first_finding(error)) from None


def load_splits(path: Path) -> dict[str, Split]:
    """Return the splits in the file `FIT` or `TEST`; `UserError` if one is missing or differs from `dataset.json`."""
    meta = load_meta(path.parent)
    try:
        arrays = safetensors.numpy.load_file(_check_size(path, LARGEST))
    except (OSError, SafetensorError) as error:
        raise _unusable(path, error) from error
    for key in ARRAYS[path.name]:
        if key not in arrays or _describe(arrays[key]) != meta.arrays[key]:
            raise _unusable(path, f"{key} is not the array that dataset.json describes")
    for split in FILES[path.name]:
        y = arrays[f"{split}_y"]
        if len(y) and not 0 <= y.min() <= y.max() < meta.classes:
            raise _unusable(path, f"{split}_y has labels from {y.min()} to {y.max()}, not 0..{meta.classes - 1}")
    return {split: Split(arrays[f"{split}_x"], arrays[f"{split}_y"]) for split in FILES[path.name]}


def _check_size(path: Path, largest: int) -> Path:
    """Return the path of a file to be read if it is a regular one of at most `largest` bytes, else raise OSError."""
    used.note(path)
    if not path.is_file():
        raise OSError("there is no such file")
    if (size := path.stat().st_size) > largest:
        raise OSError(f"it has {size:,} bytes")
    return path


def _unusable(path: Path, why: object) -> UserError:
    reason = textwrap.shorten(str(why), 200, placeholder=" …")
    return UserError(f"{path} is missing or damaged ({reason}): get it back with `dvc repro prepare`")


def _describe(array: Array) -> ArrayInfo:
    return ArrayInfo(array.shape, str(array.dtype), sha256(array.data))
