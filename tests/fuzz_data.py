"""Damaged data files: a user's own, published ones, and prepared ones."""

import gzip
import io
import random
import shutil
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from phasegate.data import Fit, load_fit, load_meta, load_test
from phasegate.files import sha256
from phasegate.prepare import prepare
from phasegate.sources import SOURCES, download, fashion_mnist, load_fashion_mnist, load_source
from phasegate.sources.cifar import load_cifar
from tests import fuzz_checkpoints
from tests.damage import damaged_bytes, replaced
from tests.fuzz import Case
from tests.fuzz_checkpoints import damaged_json, damaged_weights
from tests.test_data import SIGNALLING, own_data
from tests.test_sources import SMALL, cifar_archive, cifar_files


def originals(folder: Path) -> Path:
    """A data set of every kind."""
    fashion_mnist.DEBIAN, fashion_mnist.URL, download.PAUSE = folder / "absent", "http://127.0.0.1:1", 0
    SOURCES["cifar100"] = partial(load_cifar, form=SMALL)
    fuzz_checkpoints.prepared(folder / "prepared")
    own_data(folder)
    (folder / "fashion_mnist").mkdir()
    for name in fashion_mnist.SHA256:
        shape = [12, 28, 28] if "images" in name else [12]
        content = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes() + bytes(np.prod(shape))
        (folder / "fashion_mnist" / name).write_bytes(content)
    return folder


def case(state: Path, draw: random.Random, folder: Path) -> Case:
    """One damaged data set, to be read."""
    return draw.choice([own, own, own, cifar, cifar, fashion, described, described])(state, draw, folder)


def own(state: Path, draw: random.Random, folder: Path) -> Case:
    """A user's .npz file, to be prepared."""
    path, out = folder / "own.npz", folder.parent / "out"
    content = (state / "own.npz").read_bytes()
    match draw.choice(["bytes", "bytes", "members", "members", "arrays", "arrays", "arrays", "replaced"]):
        case "bytes":
            path.write_bytes(damaged_bytes(content, draw))
        case "members":
            path.write_bytes(_damaged_members(content, draw))
        case "arrays":
            with np.load(io.BytesIO(content)) as archive:
                arrays: dict[str, Any] = _damaged_arrays(dict(archive), draw)
            draw.choice([np.savez, np.savez_compressed])(path, **arrays)
        case "replaced":
            replaced(path, draw)
    return Case((lambda: load_source("npz", path), lambda: prepare("npz", out, path, 12, 0, {"first": [1, 0, 0]})))


def _damaged_members(content: bytes, draw: random.Random) -> bytes:
    """An archive with damaged members, whose directory is true."""
    buffer = io.BytesIO()
    method = draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(buffer, "w", method) as damaged:
        chosen = draw.choice(archive.namelist())
        for name in archive.namelist():
            member = archive.read(name)
            if name == chosen:
                head, at = bytearray(member[:128]), draw.randrange(128)
                head[at : at + draw.choice([1, 2, 5])] = draw.choice(
                    [b"9", b"99999", b"-1", b"L", b"O", b"(" * 60, b"'", b"\0"]
                )
                member = draw.choice([bytes(head) + member[128:], damaged_bytes(member, draw), bytes(20 << 20)])
                name = draw.choice([name] * 9 + [name.upper(), f"/{name}", f"../{name}", "x"])
            damaged.writestr(name, member)
    return buffer.getvalue()


def _damaged_arrays(arrays: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    for _ in range(draw.choice([1, 1, 2])):
        key = draw.choice(sorted(arrays))
        array = np.array(arrays[key])
        dtypes = (
            "f2",
            "f4",
            "g",
            ">f8",
            "i1",
            "u8",
            ">i4",
            "?",
            "c16",
            "O",
            "U3",
            "S3",
            "M8[s]",
            "m8[s]",
            "V8",
            "i4,f4",
        )
        match draw.choice(["value", "value", "dtype", "shape", "constant", "object", "scaled"]):
            case "value" if array.size:
                values = (0, -1, 3, 2**40, 2**63 - 1, 1e-300, 1e-160, 3e38, 1e300, np.nan, np.inf, SIGNALLING[0])
                value = draw.choice([value for value in values if array.dtype.kind == "f" or isinstance(value, int)])
                array.flat[draw.randrange(array.size)] = value
                arrays[key] = array if draw.random() < 0.8 else np.full_like(array, value)
            case "dtype":
                try:
                    arrays[key] = array.astype(draw.choice(dtypes))
                except (TypeError, ValueError):  # no such conversion
                    arrays[key] = np.zeros(array.shape, draw.choice(dtypes))
            case "shape":
                shapes = (
                    array[None],
                    array.ravel(),
                    array[:0],
                    array[:1],
                    array.T,
                    array[..., None, None, None],
                    np.array(1),
                )
                arrays[key] = draw.choice(shapes)
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
    """A CIFAR archive or its folder."""
    path, files = folder / "cifar.tar.gz", cifar_files()
    chosen = draw.choice(sorted(files))
    match draw.choice(["bytes", "tar", "tar", "tar", "content", "content", "members", "replaced", "folder"]):
        case "bytes":
            path.write_bytes(damaged_bytes(cifar_archive(path, files).read_bytes(), draw))
        case "tar":
            content = gzip.decompress(cifar_archive(path, files).read_bytes())
            at = 512 * draw.choice([0, 13, 14, 15, 16, 17])  # headers, and what follows them
            block = damaged_bytes(content[at : at + 512], draw)
            if draw.random() < 0.7 and len(block) == 512:  # with a checksum that is true
                block = block[:148] + b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 256) + block[156:]
            path.write_bytes(gzip.compress(content[:at] + block + content[at + 512 :]))
        case "content":
            files[chosen] = damaged_bytes(files[chosen], draw)
            cifar_archive(path, files, link=draw.choice(["", "", chosen]))
        case "members":
            _odd_members(path, files, draw)
        case "replaced":
            replaced(path, draw)
        case "folder":
            path = folder / "cifar"
            path.mkdir()
            for name, content in files.items():
                (path / name).write_bytes(content)
            replaced(path / chosen, draw)
    return Case((lambda: load_source("cifar10", path), lambda: load_source("cifar100", path)))


def _odd_members(path: Path, files: dict[str, bytes], draw: random.Random) -> None:
    formats = [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
    with tarfile.open(path, "w:gz", format=draw.choice(formats)) as archive:
        for name, content in files.items():
            for _ in range(draw.choice([0, 1, 1, 1, 1, 2])):
                place = draw.choice(
                    ["cifar"] * 8 + ["", "/cifar", "../cifar", "./cifar", "cifar/../cifar", "x" * 300, "é"]
                )
                member = tarfile.TarInfo(f"{place}/{name}")
                member.size = draw.choice([len(content)] * 9 + [0, 1 << 20, 1 << 33])
                member.type = draw.choice([tarfile.REGTYPE] * 9 + [bytes([draw.randrange(256)])])
                if draw.random() < 0.2:
                    keys = (
                        "size",
                        "path",
                        "mtime",
                        "GNU.sparse.map",
                        "GNU.sparse.size",
                        "GNU.sparse.major",
                        "linkpath",
                    )
                    values = ("1", "-1", "9" * 30, "x", "", "0,5,9", "nan")
                    member.pax_headers = {draw.choice(keys): draw.choice(values) for _ in range(2)}
                    member.pax_headers |= draw.choice([{}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}])
                archive.addfile(member)
                archive.fileobj.write(content + bytes(-len(content) % 512))


def fashion(state: Path, draw: random.Random, folder: Path) -> Case:
    """The four files of Fashion-MNIST, of which those with the right hash can lie as well."""
    (folder / "fashion_mnist").mkdir()
    hashes, chosen = {}, draw.choice(sorted(fashion_mnist.SHA256))
    for name in fashion_mnist.SHA256:
        path, content = folder / "fashion_mnist" / f"{name}.gz", (state / "fashion_mnist" / name).read_bytes()
        hashes[name], damage = sha256(content), draw.choice(["gzip", "content", "header", "replaced", "large"])
        path.write_bytes(gzip.compress(content))
        if name != chosen:
            continue
        match damage:
            case "gzip":
                path.write_bytes(damaged_bytes(path.read_bytes(), draw))
            case "content" | "header" | "large":
                lie = damaged_bytes(content[:16], draw) + content[16:]
                lie = {"content": damaged_bytes(content, draw), "header": lie, "large": bytes(80 << 20)}[damage]
                path.write_bytes(gzip.compress(lie, 1))
                hashes[name] = draw.choice([hashes[name], sha256(lie)])
            case "replaced":
                replaced(path, draw)
    return Case((lambda: load_fashion_mnist(folder, hashes),))


def described(state: Path, draw: random.Random, folder: Path) -> Case:
    """Prepared arrays, and what describes them."""
    shutil.copytree(state / "prepared", folder / "prepared")
    prepared = folder / "prepared"
    arrays, meta = prepared / "fit.safetensors", prepared / "dataset.json"
    before = arrays.read_bytes()
    match draw.choice(["arrays", "arrays", "bytes", "bytes", "meta", "meta", "meta", "replaced"]):
        case "arrays":
            arrays.write_bytes(damaged_weights(before, draw))
        case "bytes":
            path = draw.choice([arrays, meta])
            path.write_bytes(damaged_bytes(path.read_bytes(), draw))
        case "meta":
            text = damaged_json(meta.read_text(), draw) + " " * draw.choice([0, 0, 0, 5 << 20, 20 << 20])
            meta.write_bytes(text.encode(errors="surrogatepass"))
        case "replaced":
            replaced(draw.choice([arrays, meta, prepared]), draw)
    return Case((lambda: _same(load_fit(prepared), state), lambda: load_test(prepared), lambda: load_meta(prepared)))


def _same(fit: Fit, state: Path) -> None:
    expected = load_fit(state / "prepared")
    for split in ("train", "signal", "gate"):
        for part in "xy":
            assert np.array_equal(getattr(getattr(fit, split), part), getattr(getattr(expected, split), part)), split
