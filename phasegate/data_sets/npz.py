"""Load a user's own data set from an .npz file of plain arrays."""

import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from phasegate.base.errors import UserError
from phasegate.data_sets.raw import Raw
from phasegate.records.prepared import LARGEST, Array, Split

KEYS = ("x_train", "y_train", "x_test", "y_test")


def load(path: Path) -> Raw:
    """Load x_train, y_train, x_test and y_test; a (N, F) array of features becomes (N, F, 1).

    Features are channels of length one: each is standardised by itself, and none is shifted into another. x is an
    integer or float array (N, F), (N, C, L) or (N, C, H, W); channels-last is not guessed. y (N,) is integer, with
    the labels 0..n-1, each of them in y_train. Raises `UserError` for anything else.
    """
    x_train, y_train, x_test, y_test = arrays = _read(path)
    for key, array in zip(KEYS, arrays, strict=True):
        _check_array(f"{key} in {path}", array, labels=key.startswith("y"))
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y):
            raise UserError(f"{path} has {len(x)} rows in x_{part} but {len(y)} in y_{part}: both need the same")
    if x_train.shape[1:] != x_test.shape[1:]:
        shapes = f"{x_train.shape[1:]} in x_train but {x_test.shape[1:]} in x_test"
        raise UserError(f"{path} has examples of shape {shapes}: both need the same")
    present = np.unique(y_train)
    if len(present) < 2 or not np.array_equal(present, np.arange(len(present))):
        raise UserError(
            f"y_train in {path} has {len(present)} different labels from {present[0]} to {present[-1]}:"
            " n classes, at least two, must have the labels 0..n-1"
        )
    if y_test.min() < 0 or y_test.max() >= len(present):
        raise UserError(
            f"y_test in {path} has labels from {y_test.min()} to {y_test.max()}:"
            f" they must be in 0..{len(present) - 1}, as in y_train"
        )
    if x_train.ndim == 2:
        x_train, x_test = x_train[:, :, None], x_test[:, :, None]
    return Raw(Split(x_train, y_train.astype(np.int64)), Split(x_test, y_test.astype(np.int64)))


def _read(path: Path) -> list[Array]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = Counter(archive.namelist())
            if wrong := [key for key in KEYS if names[f"{key}.npy"] != 1]:
                raise UserError(f"{path} lacks {', '.join(wrong)}: it must hold {', '.join(KEYS)}, each of them once")
            members = [archive.getinfo(f"{key}.npy") for key in KEYS]
            if (size := sum(member.file_size for member in members)) > LARGEST:
                raise UserError(f"{path} holds arrays of {size:,} bytes: half of this machine's memory is {LARGEST:,}")
            return [_read_member(archive, member) for member in members]
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and zlib share no base class for what a damaged file raises
        raise UserError(
            f"{path} is no complete .npz file of plain, non-object arrays ({type(error).__name__}):"
            " save it again with numpy.savez"
        ) from error


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    """Read an array whose header, size and checksum agree; memory is only taken for bytes that are there."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile bounds no others
        raise ValueError("not compressed as numpy does it")
    with archive.open(member) as file:
        version = npy.read_magic(file)  # type: ignore[no-untyped-call, unused-ignore]
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        with warnings.catch_warnings(action="ignore"):  # about headers that Python 2 wrote
            shape, fortran, dtype = read_header(file)
        content = file.read(member.file_size - file.tell())
        return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _check_array(name: str, array: Array, labels: bool) -> None:
    kinds, axes = ("iu", (1,)) if labels else ("iuf", (2, 3, 4))
    if array.dtype.kind not in kinds:
        raise UserError(f"{name} has dtype {array.dtype}: it must be {'integer' if labels else 'integer or float'}")
    if array.ndim not in axes or array.size == 0:
        right = "(N,)" if labels else "(N, F), (N, C, L) or (N, C, H, W)"
        raise UserError(f"{name} has shape {array.shape}: it must be {right} and not empty")
    with np.errstate(all="ignore"):
        bad = np.flatnonzero(~np.isfinite(array.astype(np.float32)))
    if len(bad):
        raise UserError(f"{name} has {len(bad)} values like {array.flat[bad[0]]}: all must be finite in float32")
