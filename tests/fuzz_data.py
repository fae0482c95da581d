"""Damage data files: a user's own, published ones, and prepared ones."""

import gzip
import io
import random
import shutil
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pooch

from phasegate.data_sets import cifar100, fashion_mnist
from phasegate.data_sets.cifar import load_cifar
from phasegate.data_sets.npz import LAYOUTS
from phasegate.data_sets.prepare import load_source, prepare
from phasegate.records.prepared import FIT, META, TEST, Split, load_meta, load_splits
from tests.damage import damage_file, damaged_bytes
from tests.fuzz import Case
from tests.fuzz_checkpoints import damaged_json, damaged_weights
from tests.test_data import SIGNALLING, own_data
from tests.test_data_sets import SMALL, cifar_archive, cifar_files, fashion_files
from tests.tiny_data import write_tiny_data

DTYPES = ["f2", "f4", "g", ">f8", "i1", "u8", ">i4", "?", "c16", "O", "U3", "S3", "M8[s]", "m8[s]", "V8", "i4,f4"]
VALUES = [0, -1, 3, 2**40, 2**63 - 1, 1e-300, 1e-160, 3e38, 1e300, np.nan, np.inf, SIGNALLING[0]]
PAX = ["size", "path", "mtime", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.major", "linkpath"]


def originals(folder: Path) -> Path:
    """Write a data set of every kind, and cut the network off."""
    fashion_mnist.DEBIAN, pooch.create = folder / "absent", Mock(side_effect=ConnectionError)
    cifar100.load = partial(load_cifar, form=SMALL)
    write_tiny_data(folder / "prepared")
    x, y = np.random.default_rng(1).normal(size=(8, 2, 7)), np.arange(8) % 3
    own_data(folder, x_val=x, y_val=y, class_names=np.array(["ash", "beech", "oak"]))
    return folder


def case(state: Path, draw: random.Random, folder: Path) -> Case:
    """Damage one data set."""
    return draw.choice([own, own, own, cifar, cifar, fashion, described, described])(state, draw, folder)


def own(state: Path, draw: random.Random, folder: Path) -> Case:
    """Damage a user's .npz file."""
    path, out = folder / "own.npz", folder.parent / "out"
    content = (state / "own.npz").read_bytes()
    match draw.choice(["file", "file", "members", "members", "arrays", "arrays", "arrays"]):
        case "file":
            path.write_bytes(content)
            damage_file(path, draw)
        case "members":
            path.write_bytes(_damaged_members(content, draw))
        case "arrays":
            with np.load(io.BytesIO(content)) as archive:
                arrays: dict[str, Any] = _damaged_arrays(dict(archive), draw)
            draw.choice([np.savez, np.savez_compressed])(path, **arrays)
    layout = draw.choice([*LAYOUTS])
    prepared = partial(prepare, "npz", out, path, 12, 0, {"first": [1, 0, 0]}, layout)
    return Case((lambda: load_source("npz", path, layout), prepared))


def _damaged_members(content: bytes, draw: random.Random) -> bytes:
    """Return an archive with damaged members, whose directory is true."""
    buffer = io.BytesIO()
    method = draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(buffer, "w", method) as damaged:
        chosen = draw.choice(archive.namelist())
        for name in archive.namelist():
            member = archive.read(name)
            if name == chosen:
                head, at = bytearray(member[:128]), draw.randrange(128)
                lies = [b"9", b"99999", b"-1", b"L", b"O", b"(" * 60, b"'", b"\0"]
                head[at : at + draw.choice([1, 2, 5])] = draw.choice(lies)
                member = draw.choice([bytes(head) + member[128:], damaged_bytes(member, draw), bytes(20 << 20)])
                name = draw.choice([name] * 9 + [name.upper(), f"/{name}", f"../{name}", "x"])
            damaged.writestr(name, member)
    return buffer.getvalue()


def _damaged_arrays(arrays: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    for _ in range(draw.choice([1, 1, 2])):
        key = draw.choice(sorted(arrays))
        array = np.array(arrays[key])
        match draw.choice(["value", "value", "dtype", "shape", "constant", "object", "scaled"]):
            case "value" if array.size:
                value = draw.choice([value for value in VALUES if array.dtype.kind == "f" or isinstance(value, int)])
                array.flat[draw.randrange(array.size)] = value
                arrays[key] = array if draw.random() < 0.8 else np.full_like(array, value)
            case "dtype":
                try:
                    arrays[key] = array.astype(draw.choice(DTYPES))
                except (TypeError, ValueError):  # no such conversion
                    arrays[key] = np.zeros(array.shape, draw.choice(DTYPES))
            case "shape":
                shapes = [array[None], array.ravel(), array[:0], array[:1], array.T, array[..., None, None, None]]
                arrays[key] = draw.choice([*shapes, np.array(1)])
            case "constant":
                with np.errstate(invalid="ignore"):
                    constant, dtype = draw.choice([0, 1, 3e38, 1e-40]), draw.choice(["f4", "f8", "i8"])
                    arrays[key] = np.full(array.shape, constant, dtype)
            case "scaled" if array.dtype.kind == "f":
                arrays[key] = array * draw.choice([1e-300, 1e-160, 1e-40, 1e-3, 1e37])
                arrays["x_test"] = draw.choice([arrays["x_test"], np.full((9, 2, 7), 3e38)])
            case "object":
                arrays[key] = draw.choice([np.array([None, {}]), np.array([[1], [2, 3]], object), "text", 3, []])
    return arrays


def cifar(state: Path, draw: random.Random, folder: Path) -> Case:
    """Damage a CIFAR archive or its folder."""
    path, files = folder / "cifar.tar.gz", cifar_files()
    chosen = draw.choice(sorted(files))
    match draw.choice(["file", "file", "tar", "tar", "tar", "content", "content", "members", "folder"]):
        case "file":
            damage_file(cifar_archive(path, files), draw)
        case "tar":
            content = gzip.decompress(cifar_archive(path, files).read_bytes())
            at = 512 * draw.choice([0, 13, 14, 15, 16, 17])  # headers, and what follows them
            block = damaged_bytes(content[at : at + 512], draw)
            if draw.random() < 0.7 and len(block) == 512:  # with a checksum that is true
                block = block[:148] + b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256) + block[156:]
            path.write_bytes(gzip.compress(content[:at] + block + content[at + 512 :]))
        case "content":
            damaged = damaged_bytes(files[chosen], draw)
            cifar_archive(path, files | {chosen: draw.choice([damaged, damaged, None])})
        case "members":
            _odd_members(path, files, draw)
        case "folder":
            path = folder / "cifar"
            path.mkdir()
            for name, content in files.items():
                (path / name).write_bytes(content)
            damage_file(path / chosen, draw)
    return Case((lambda: load_source("cifar10", path), lambda: load_source("cifar100", path)))


def _odd_members(path: Path, files: dict[str, bytes], draw: random.Random) -> None:
    formats = [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
    with tarfile.open(path, "w:gz", format=draw.choice(formats)) as archive:
        for name, content in files.items():
            for _ in range(draw.choice([0, 1, 1, 1, 1, 2])):
                places = ["", "/cifar", "../cifar", "./cifar", "cifar/../cifar", "x" * 300, "é"]
                member = tarfile.TarInfo(f"{draw.choice(['cifar'] * 8 + places)}/{name}")
                member.size = draw.choice([len(content)] * 9 + [0, 1 << 20, 1 << 33])
                member.type = draw.choice([tarfile.REGTYPE] * 9 + [bytes([draw.randrange(256)])])
                if draw.random() < 0.2:
                    values = ("1", "-1", "9" * 30, "x", "", "0,5,9", "nan")
                    member.pax_headers = {draw.choice(PAX): draw.choice(values) for _ in range(2)}
                    member.pax_headers |= draw.choice([{}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}])
                archive.addfile(member)
                archive.fileobj.write(content + bytes(-len(content) % 512))


def fashion(state: Path, draw: random.Random, folder: Path) -> Case:
    """Damage one of the four files of Fashion-MNIST."""
    hashes = fashion_files(folder / "fashion_mnist")
    path = folder / "fashion_mnist" / f"{draw.choice(sorted(hashes))}.gz"
    match draw.choice(["file", "file", "content", "large"]):
        case "file":
            damage_file(path, draw)
        case "content":
            path.write_bytes(gzip.compress(damaged_bytes(gzip.decompress(path.read_bytes()), draw), 1))
        case "large":
            path.write_bytes(gzip.compress(bytes(80 << 20), 1))
    return Case((lambda: fashion_mnist.load(folder, hashes),))


def described(state: Path, draw: random.Random, folder: Path) -> Case:
    """Damage prepared arrays or their description."""
    shutil.copytree(state / "prepared", folder / "prepared")
    prepared = folder / "prepared"
    arrays, meta = prepared / FIT, prepared / META
    match draw.choice(["arrays", "arrays", "file", "file", "file", "meta", "meta", "meta"]):
        case "arrays":
            arrays.write_bytes(damaged_weights(arrays.read_bytes(), draw))
        case "file":
            damage_file(draw.choice([arrays, arrays, meta, meta, prepared]), draw)
        case "meta":
            text = damaged_json(meta.read_text(), draw) + " " * draw.choice([0, 0, 0, 5 << 20, 20 << 20])
            meta.write_bytes(text.encode(errors="surrogatepass"))
    expected = load_splits(state / "prepared" / FIT)
    calls = (lambda: _same(load_splits(arrays), expected), lambda: load_splits(prepared / TEST))
    return Case((*calls, lambda: load_meta(prepared)))


def _same(fit: dict[str, Split], expected: dict[str, Split]) -> None:
    for name, split in expected.items():
        assert np.array_equal(fit[name].x, split.x) and np.array_equal(fit[name].y, split.y), name
