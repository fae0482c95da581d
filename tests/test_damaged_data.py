"""Data files are taken for what they are, not for what they claim: no bomb, no pickle, no lie gets through."""

import gzip
import io
import json
import os
import random
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from phasegate.base.errors import UserError
from phasegate.base.files import sha256
from phasegate.base.memory import memory
from phasegate.data_sets import cifar, fashion_mnist, npz
from phasegate.data_sets.prepare import load_source
from phasegate.records import prepared as prepared_data
from phasegate.records.prepared import FIT, META, load_meta, load_splits
from tests.damage import Evil, put
from tests.test_data import own_data, prepare_own
from tests.test_data_sets import SMALL, cifar_archive, cifar_files


def zipped(folder: Path, method: int = zipfile.ZIP_DEFLATED, **changed: bytes | None) -> Path:
    """The user's data set, with members of other bytes; None leaves one out."""
    with zipfile.ZipFile(own_data(folder)) as archive:
        members: dict[str, bytes | None] = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "damaged.npz", "w", method) as archive:
        for name, content in (members | {f"{key}.npy": content for key, content in changed.items()}).items():
            if content is not None:
                archive.writestr(name, content)
    return folder / "damaged.npz"


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


INCOMPLETE = "damaged.npz is no complete .npz file of plain, non-object arrays"


def refuse(path: Path, message: str) -> int:
    """Check the refusal of an .npz file, and return the most bytes of memory that it took."""
    tracemalloc.start()
    with pytest.raises(UserError, match=message):
        npz.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


CLAIMS = npy(np.zeros((9, 2, 7))).replace(b"(9, 2, 7), }       ", b"(9, 2, 70000000), }")
"""An array whose header claims a shape of 10 GB."""


@pytest.mark.parametrize(
    "content", [CLAIMS, b"", b"plain", npy(np.zeros((9, 2, 7)))[:-1], npy(np.array([Evil()] * 9)), npy(1)[:30]]
)
def test_members_that_lie_are_refused_without_taking_memory(tmp_path: Path, content: bytes) -> None:
    assert npz.load(zipped(tmp_path)).test.x.shape == (9, 2, 7)
    assert refuse(zipped(tmp_path, x_test=content), rf"{INCOMPLETE} \(ValueError") < 1 << 20


def test_arrays_that_python_2_wrote_are_read_without_a_warning(tmp_path: Path) -> None:
    content = npy(np.arange(9) % 3).replace(b"(9,), ", b"(9L,),")
    assert npz.load(zipped(tmp_path, y_test=content)).test.y.tolist() == [0, 1, 2] * 3


def test_a_zip_bomb_is_refused_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory() // 2 == prepared_data.LARGEST
    monkeypatch.setattr(prepared_data, "LARGEST", 4 << 20)
    monkeypatch.setattr(npz, "_read_values", lambda *_: pytest.fail("it was opened"))
    for kind in ("f8", "u1"):  # as float32 the bytes take four times as much as they claim
        path = zipped(tmp_path, x_test=npy(np.zeros((9, 2, 70_000), kind)))
        peak = refuse(path, r"damaged.npz holds 1,26\d,\d+ values, .* bytes: three quarters of .* are 6,291,456")
        assert path.stat().st_size < 1 << 17 and peak < 1 << 20
    header = npy(np.zeros((9, 2, 7))).replace(b"\1\0v\0", b"\2\0\0\0\x20\0") + bytes(1 << 21)  # it claims 2 MiB
    assert refuse(zipped(tmp_path, x_test=header), INCOMPLETE) < 1 << 20


def test_of_a_member_no_more_is_read_than_it_claims(tmp_path: Path) -> None:
    large, small = (npy(np.zeros((9, 2, length))) for length in (700_000, 700))
    path, claim = zipped(tmp_path, x_test=large), len(large).to_bytes(4, "little")
    assert path.read_bytes().count(claim) == 2
    path.write_bytes(path.read_bytes().replace(claim, len(small).to_bytes(4, "little")))
    assert refuse(path, INCOMPLETE) < 1 << 20


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_are_odd_or_damaged_are_refused(tmp_path: Path) -> None:
    lacking = r"damaged.npz lacks y_test: it must hold x_train, .*, each of them once"
    refuse(zipped(tmp_path, y_test=None), lacking)
    path = zipped(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y_test.npy", npy(np.arange(9) % 3))
    refuse(path, lacking)
    refuse(zipped(tmp_path, zipfile.ZIP_BZIP2), rf"{INCOMPLETE} \(ValueError\)")  # zipfile can't bound what it reads
    encrypted = bytearray(zipped(tmp_path).read_bytes())
    flipped = bytearray(zipped(tmp_path, zipfile.ZIP_STORED).read_bytes())
    for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        encrypted[encrypted.index(mark) + flags] |= 1
    flipped[1000] ^= 1
    for content, cause in ((encrypted, "RuntimeError"), (flipped, "BadZipFile")):
        path.write_bytes(content)
        refuse(path, rf"{INCOMPLETE} \({cause}\)")


def test_a_cifar_archive_that_grows_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(cifar.CIFAR10.sizes.values()) < sum(cifar.CIFAR100.sizes.values()) < cifar.LARGEST
    monkeypatch.setattr(cifar, "LARGEST", 1 << 17)
    path = cifar_archive(tmp_path / "cifar.tar.gz", cifar_files())
    assert cifar.load_cifar(path, SMALL).test.x.shape == (4, 3, 32, 32)
    more = {f"more_{number}": bytes(1 << 17) for number in range(2)}
    for bomb in (cifar_files() | more, more | cifar_files()):
        cifar_archive(path, bomb)
        with pytest.raises(UserError, match=r"cifar.tar.gz .* \(more than 131,072 bytes when decompressed\)"):
            cifar.load_cifar(path, SMALL)


def test_names_that_lead_elsewhere_are_not_cifar_files(tmp_path: Path) -> None:
    for folder in ("/cifar", "../cifar", "x/../cifar"):
        archive = cifar_archive(tmp_path / "cifar.tar.gz", cifar_files(), folder)
        with pytest.raises(UserError, match=r"lacks coarse.txt, fine.txt, test.bin, train.bin in cifar"):
            cifar.load_cifar(archive, SMALL)
        assert [*tmp_path.iterdir()] == [archive]


def test_of_a_cifar_folder_no_more_is_read_than_its_files_have(tmp_path: Path) -> None:
    for name, content in cifar_files().items():
        (tmp_path / name).write_bytes(content)
    os.truncate(tmp_path / "test.bin", 1 << 40)
    with pytest.raises(UserError, match=r"test.bin has more than 12,296 bytes"):
        cifar.load_cifar(tmp_path, SMALL)


@pytest.mark.parametrize("name", ["npz", "cifar10", "fashion_mnist"])
def test_places_that_hold_no_data_are_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    half = gzip.compress(random.Random(0).randbytes(4000))[:3000]
    for file, content in {"empty": b"", "text": b"text", "half": half}.items():
        (tmp_path / file).write_bytes(content)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path)
    monkeypatch.setattr(fashion_mnist, "URL", "nonsense")
    monkeypatch.setattr(fashion_mnist, "RETRIES", 0)
    odd = {
        "pipe": "pipe', which is neither a file nor a folder",
        "absent": "absent', which does not exist",
        "x" * 300: r"can't be used \(File name too long\)",
    }
    for place in (*odd, "empty", "text", "half", "folder"):
        with pytest.raises(UserError, match=odd.get(place, f"{place} .*(no complete|lacks)|can't be downloaded")):
            load_source(name, tmp_path / place)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "test_batch.bin").touch()
    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(UserError, match=r"test_batch.bin can't be read: Permission denied"):
        load_source("cifar10", tmp_path)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    return prepare_own(tmp_path)


def change_meta(folder: Path, key: str, value: Any) -> None:
    content = json.loads((folder / META).read_text())
    put(content, key, value)
    (folder / META).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", 3, "'name': Input should be a valid string"),
        ("tasks.first", ["1", 0, 0], "'tasks.first.0': Input should be a valid integer"),
        ("tasks.first", [-1, 0, 0], "'tasks.first.0': Input should be greater"),
        ("arrays.gate_y.shape", [-6], "'arrays.gate_y.shape.0': Input should be greater"),
        ("mean", [float("nan"), 1.0], "'mean.0': Input should be a finite number"),
        ("std", [1.0] * 3, "std has 3 values, not 2"),
        ("tasks.first", [0, 1], "task 'first' has 2 values, not 3"),
        ("arrays", {n: {"shape": [], "dtype": "", "sha256": ""} for n in ["a", "x" * 9999]}, "its arrays are .* …"),
        ("arrays.gate_x.shape", [6, 3, 7], r"gate_x has shape \(6, 3, 7\) in float32, not \(6, 2, 7\)"),
        ("arrays.gate_y.shape", [7], r"gate_x has shape \(6, 2, 7\) in float32, not \(7, 2, 7\)"),
        ("arrays.gate_y.shape", [6, 2], r"gate_y has shape \(6, 2\) in int64, not \(6,\)"),
        ("arrays.train_x.shape", [48], r"train_x has shape \(48,\)"),
        ("arrays.gate_x.dtype", "float64", "float64, not .* in float32"),
    ],
)
def test_a_description_that_is_not_one_is_refused(prepared: Path, key: str, value: Any, message: str) -> None:
    change_meta(prepared, key, value)
    message = rf"^\S+dataset.json is missing or damaged \(.*{message}.*dvc repro prepare`$"
    with pytest.raises(UserError, match=message) as refused:
        load_meta(prepared)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[]", "null", "", "{", '{"name": "' + "x" * (1 << 24) + '"}', "\x1b[2J\n"]
)
def test_a_description_of_absurd_size_or_depth_is_refused_in_one_line(prepared: Path, content: str) -> None:
    (prepared / META).write_text(content)
    with pytest.raises(UserError, match=r"dataset.json is missing or damaged") as refused:
        load_meta(prepared)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500


def test_labels_beyond_the_classes_are_refused(prepared: Path) -> None:
    arrays = safetensors.numpy.load_file(prepared / FIT)
    arrays["gate_y"][3] = 3
    safetensors.numpy.save_file(arrays, prepared / FIT)
    change_meta(prepared, "arrays.gate_y.sha256", sha256(arrays["gate_y"].data))
    with pytest.raises(UserError, match=r"fit.safetensors is .* \(gate_y has labels from 0 to 3, not 0\.\.2\)"):
        load_splits(prepared / FIT)


def test_prepared_files_damaged_or_of_other_kinds_are_refused(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (prepared / FIT).read_bytes()
    for damaged in (whole[:-9], whole[:-9] + b"12345678}"):
        (prepared / FIT).write_bytes(damaged)
        with pytest.raises(UserError, match=r"fit.safetensors is missing or damaged .*dvc repro prepare"):
            load_splits(prepared / FIT)
    monkeypatch.setattr(prepared_data, "LARGEST", 1000)
    with pytest.raises(UserError, match=r"fit.safetensors is .* \(it has 4,\d+ bytes\)"):
        load_splits(prepared / FIT)
    for file in (FIT, META):
        (prepared / file).unlink()
        os.mkfifo(prepared / file)
        with pytest.raises(UserError, match=rf"{file} is missing or damaged \(there is no such file\)"):
            load_splits(prepared / FIT)


def test_what_a_cifar_archive_claims_of_a_member_is_not_believed(tmp_path: Path) -> None:
    claims = {
        f"{int('9' * 30):,} bytes are claimed for a member": {"size": "9" * 30},
        "invalid literal for int": {"GNU.sparse.map": "0,nan", "GNU.sparse.size": "1"},
    }
    for why, headers in claims.items():
        archive = cifar_archive(tmp_path / "cifar.tar.gz", {"other": b""}, **headers)
        with pytest.raises(UserError, match=rf"cifar.tar.gz is no complete .tar.gz archive \({why}"):
            cifar.load_cifar(archive, SMALL)
