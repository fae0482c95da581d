"""Load a user's own data set from an .npz file of plain arrays."""

import io
import math
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib import format as npy

from phasegate.base.errors import UserError, printable
from phasegate.data_sets.raw import LEAST, Raw, some
from phasegate.records.prepared import Array, Split, check_memory

NEEDED, VALIDATION, NAMES = ("x_train", "y_train", "x_test", "y_test"), ("x_val", "y_val"), "class_names"
LAYOUTS = {  # what the axes of x mean, by their number
    "channels_first": {2: "(N, F)", 3: "(N, C, L)", 4: "(N, C, H, W)"},
    "channels_last": {2: "(N, F)", 3: "(N, L, C)", 4: "(N, H, W, C)"},
    "no_channels": {2: "(N, L)", 3: "(N, H, W)"},
}
HEADER = 1 << 16  # bytes in which the header of an array must end, a generous bound


class Member(NamedTuple):
    """Describe an array of the file."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    order: Literal["F", "C"]
    dtype: np.dtype[Any]
    offset: int  # of its values


def load(path: Path, layout: str = "channels_first") -> Raw:
    """Load x_train, y_train, x_test, y_test, and if they are there x_val, y_val and class_names.

    x is an integer or float array, whose axes `LAYOUTS` names; channels become the second axis. Features are channels
    of length one: each is standardised by itself, and none is shifted into another. y (N,) or (N, 1) is integer, with
    the labels 0..n-1, each of them in y_train. Raises `UserError` for anything else.
    """
    arrays, unused = _read(path)
    parts = [part for part in ("train", "test", "val") if f"x_{part}" in arrays]
    splits = {part: _split(path, part, arrays[f"x_{part}"], arrays[f"y_{part}"], layout) for part in parts}
    train = splits["train"]
    present = np.unique(train.y)
    if len(present) < 2 or not np.array_equal(present, np.arange(len(present))):
        raise UserError(
            f"y_train in {path} has {len(present)} different labels from {present[0]} to {present[-1]}:"
            " n classes, at least two, must have the labels 0..n-1"
        )
    for part, split in splits.items():
        if split.x.shape[1:] != train.x.shape[1:]:
            shapes = f"{arrays['x_train'].shape[1:]} in x_train but {arrays[f'x_{part}'].shape[1:]} in x_{part}"
            raise UserError(f"{path} has examples of shape {shapes}: both need the same")
        if split.y.min() < 0 or split.y.max() >= len(present):
            raise UserError(
                f"y_{part} in {path} has labels from {split.y.min()} to {split.y.max()}:"
                f" they must be in 0..{len(present) - 1}, as in y_train"
            )
    names = _class_names(f"{NAMES} in {path}", arrays[NAMES], len(present)) if NAMES in arrays else ()
    remarks = [_reading(arrays["x_train"].shape, train.x.shape[1:], layout)]
    if "val" in splits:
        if len(splits["val"]) < LEAST:
            raise UserError(f"x_val, y_val in {path} have {len(splits['val'])} examples: they need at least {LEAST}")
        remarks.append(f"{' and '.join(VALIDATION)} are the validation, so data.validation is not used")
    if unused:
        remarks.append(f"{path} also holds {some(unused)}: not used")
    return Raw(train, splits["test"], splits.get("val"), class_names=names, remarks=tuple(remarks))


def _split(path: Path, part: str, x: Array, y: Array, layout: str) -> Split:
    """Return the arrays of a split, checked, with the axes that a `Raw` has."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    _check_array(f"x_{part} in {path}", x, "integer or float", LAYOUTS[layout], f" (data.layout: {layout})")
    _check_array(f"y_{part} in {path}", y, "integer", {1: "(N,)"})
    if len(x) != len(y):
        raise UserError(f"{path} has {len(x)} rows in x_{part} but {len(y)} in y_{part}: both need the same")
    match layout:
        case "no_channels":
            x = x[:, None]
        case _ if x.ndim == 2:
            x = x[:, :, None]
        case "channels_last":
            x = np.moveaxis(x, -1, 1)
    return Split(x, y.astype(np.int64))


def _reading(shape: tuple[int, ...], example: tuple[int, ...], layout: str) -> str:
    """Return in a sentence how x was read, with other readings where this one is no matter of course."""
    axes, (channels, *sizes) = len(shape), example
    size = " x ".join(map(str, sizes)) if len(sizes) == 2 else f"length {sizes[0]}"
    form, each = LAYOUTS[layout][axes], f"channel{'s' if channels > 1 else ''} of {size}"
    each = "features" if form == "(N, F)" else each
    text = f"x_train, {shape}, is read as {form}: {channels} {each} (data.layout: {layout})"
    if channels == 1 or axes == 2 or (axes == 4 and channels <= min(sizes)):
        return text
    others = [f"{forms[axes]} by {other}" for other, forms in LAYOUTS.items() if other != layout and axes in forms]
    return f"{text}; it would be {', or '.join(others)}"


def _class_names(name: str, array: Array, classes: int) -> tuple[str, ...]:
    if array.dtype.kind not in "US" or array.shape != (classes,):
        raise UserError(
            f"{name} has shape {array.shape} and dtype {array.dtype}: it must be {classes} strings, a name for each"
            " class in y_train"
        )
    try:
        if (
            array.dtype.kind == "U"
            and array.astype(array.dtype.newbyteorder("=")).view(np.uint32).max() > sys.maxunicode
        ):
            raise ValueError("beyond Unicode")  # numpy would make strings that end the process
        return tuple(text.decode() if isinstance(text, bytes) else text for text in array.tolist())
    except ValueError as error:
        raise UserError(f"{name} can't be read: it must hold Unicode strings, or bytes in UTF-8") from error


def _read(path: Path) -> tuple[dict[str, Array], list[str]]:
    """Return the arrays by name, and what else the file holds, if all fits into memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = Counter(name.removesuffix(".npy") for name in archive.namelist())
            keys = [*NEEDED, *(VALIDATION if names.keys() & VALIDATION else ()), *names.keys() & {NAMES}]
            if wrong := [key for key in keys if names[key] != 1]:
                raise UserError(f"{path} lacks {', '.join(wrong)}: it must hold {', '.join(keys)}, each of them once")
            infos = [archive.getinfo(f"{key}.npy") for key in keys]
            members = {key: _read_header(archive, info) for key, info in zip(keys, infos, strict=True)}
            values = sum(math.prod(member.shape) for key, member in members.items() if key != NAMES)
            check_memory(str(path), values, sum(info.file_size for info in infos))
            unused = sorted(printable(name) for name in names if name not in keys)
            return {key: _read_values(archive, member) for key, member in members.items()}, unused
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and zlib share no base class for what a damaged file raises
        raise UserError(
            f"{path} is no complete .npz file of plain, non-object arrays ({type(error).__name__}):"
            " save it again with numpy.savez"
        ) from error


def _read_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    """Read what an array claims to be, which must agree with its size."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile bounds no others
        raise ValueError("not compressed as numpy does it")
    with archive.open(info) as file:
        head = io.BytesIO(file.read(HEADER))
    version = npy.read_magic(head)  # type: ignore[no-untyped-call, unused-ignore]
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
    with warnings.catch_warnings(action="ignore"):  # about headers that Python 2 wrote
        shape, fortran, dtype = read_header(head)
    if math.prod(shape) * dtype.itemsize != info.file_size - head.tell():
        raise ValueError("of another size than its header claims")
    return Member(info, shape, "F" if fortran else "C", dtype, head.tell())


def _read_values(archive: zipfile.ZipFile, member: Member) -> Array:
    """Read an array whose size and checksum agree; memory is only taken for bytes that are there."""
    with archive.open(member.info) as file:
        file.read(member.offset)
        content = file.read(member.info.file_size - member.offset)
    return np.frombuffer(content, member.dtype).reshape(member.shape, order=member.order)


def _check_array(name: str, array: Array, kind: str, axes: Mapping[int, str], why: str = "") -> None:
    if array.dtype.kind not in {"integer": "iu", "integer or float": "iuf"}[kind]:
        raise UserError(f"{name} has dtype {array.dtype}: it must be {kind}")
    if array.ndim not in axes or array.size == 0:
        *most, last = axes.values()
        right = f"{', '.join(most)} or {last}" if most else last
        raise UserError(f"{name} has shape {array.shape}: it must be {right}{why} and not empty")
    with np.errstate(all="ignore"):
        bad = np.flatnonzero(~np.isfinite(array.astype(np.float32)))
    if len(bad):
        raise UserError(f"{name} has {len(bad)} values like {array.flat[bad[0]]}: all must be finite in float32")
