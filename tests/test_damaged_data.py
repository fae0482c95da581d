"""Data files are taken for what they are, not for what they claim: no bomb, no pickle, no lie gets through."""

import gzip
import io
import json
import os
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from phasegate import data
from phasegate.data import load_fit, load_meta
from phasegate.errors import UserError
from phasegate.files import sha256
from phasegate.sources import cifar, download, fashion_mnist, load_fashion_mnist, load_npz, load_source, npz
from tests.damage import Evil
from tests.test_data import own_data
from tests.test_data import prepared as prepared_in
from tests.test_sources import SMALL, cifar_archive, cifar_files


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


def refused_with(path: Path, message: str) -> int:
    """The most bytes of memory that it took to refuse an .npz file."""
    tracemalloc.start()
    with pytest.raises(UserError, match=message):
        load_npz(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


CLAIMS = npy(np.zeros((9, 2, 7))).replace(b"(9, 2, 7), }       ", b"(9, 2, 70000000), }")
"""An array whose header claims a shape of 10 GB."""


@pytest.mark.parametrize(
    "content", [CLAIMS, b"", b"plain", npy(np.zeros((9, 2, 7)))[:-1], npy(np.array([Evil()] * 9)), npy(1)[:30]]
)
def test_members_that_lie_are_refused_without_taking_memory(tmp_path: Path, content: bytes) -> None:
    assert load_npz(zipped(tmp_path)).test.x.shape == (9, 2, 7)
    message = r"damaged.npz is no complete .npz file of plain, non-object arrays \(ValueError"
    assert refused_with(zipped(tmp_path, x_test=content), message) < 1 << 20


def test_arrays_that_python_2_wrote_are_read_without_a_warning(tmp_path: Path) -> None:
    content = npy(np.arange(9) % 3).replace(b"(9,), ", b"(9L,),")
    assert load_npz(zipped(tmp_path, y_test=content)).test.y.tolist() == [0, 1, 2] * 3


def test_a_zip_bomb_is_refused_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 == data.LARGEST
    path = zipped(tmp_path, x_test=npy(np.zeros((9, 2, 70_000))))
    monkeypatch.setattr(npz, "LARGEST", 1 << 20)
    monkeypatch.setattr(npz, "_read_member", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(UserError, match=r"damaged.npz holds arrays of 10,\d+,\d+ bytes: half of this machine's memory"):
        load_npz(path)
    assert path.stat().st_size < 1 << 17


def test_of_a_member_no_more_is_read_than_it_claims(tmp_path: Path) -> None:
    large, small = (npy(np.zeros((9, 2, length))) for length in (700_000, 700))
    path, claim = zipped(tmp_path, x_test=large), len(large).to_bytes(4, "little")
    assert path.read_bytes().count(claim) == 2
    path.write_bytes(path.read_bytes().replace(claim, len(small).to_bytes(4, "little")))
    assert refused_with(path, "no complete .npz file") < 1 << 20


def test_methods_that_zipfile_can_not_bound_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no complete .npz file"):
        load_npz(zipped(tmp_path, zipfile.ZIP_BZIP2))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_are_missing_double_or_encrypted_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lacks y_test: it must hold x_train, .*, each of them once"):
        load_npz(zipped(tmp_path, y_test=None))
    path = zipped(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y_test.npy", npy(np.arange(9) % 3))
    with pytest.raises(UserError, match=r"lacks y_test: it must hold x_train, .*, each of them once"):
        load_npz(path)
    content = bytearray(zipped(tmp_path).read_bytes())
    for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(mark) + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"no complete .npz file .* \(RuntimeError\)"):
        load_npz(path)


def test_flipped_bits_in_arrays_are_noticed(tmp_path: Path) -> None:
    content = bytearray(zipped(tmp_path, zipfile.ZIP_STORED).read_bytes())
    content[1000] ^= 1
    (tmp_path / "flipped.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"no complete .npz file .* \(BadZipFile\)"):
        load_npz(tmp_path / "flipped.npz")


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
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        for name, content in cifar_files().items():
            for place in (f"/cifar/{name}", f"../cifar/{name}", f"x/../cifar/{name}"):
                member = tarfile.TarInfo(place)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match=r"lacks coarse.txt, fine.txt, test.bin, train.bin in cifar"):
        cifar.load_cifar(tmp_path / "cifar.tar.gz", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar.tar.gz"]


def test_of_a_cifar_folder_no_more_is_read_than_its_files_have(tmp_path: Path) -> None:
    for name, content in cifar_files().items():
        (tmp_path / name).write_bytes(content)
    os.truncate(tmp_path / "test.bin", 1 << 40)
    with pytest.raises(UserError, match=r"test.bin in .* has 12297 bytes, not 12296"):
        cifar.load_cifar(tmp_path, SMALL)


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ("has more than 67,108,864 bytes uncompressed", bytes((1 << 26) + 1)),
        ("is no idx file of bytes with 3 axes", b""),
        ("is no idx file of bytes with 3 axes", bytes([0, 0, 8, 3]) + bytes([255] * 12)),
        ("is no idx file of bytes with 3 axes", bytes([0, 0, 8, 1]) + bytes(3) + bytes([12]) + bytes(12)),
        ("is no idx file of bytes with 3 axes", bytes([0, 0, 13, 3]) + b"\0\0\0\2" * 3 + bytes(8)),
    ],
)
def test_a_fashion_mnist_file_is_what_its_header_says(tmp_path: Path, message: str, content: bytes) -> None:
    (tmp_path / "fashion_mnist").mkdir()
    for name in fashion_mnist.SHA256:
        (tmp_path / "fashion_mnist" / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    with pytest.raises(UserError, match=f"train-images-idx3-ubyte.gz {message}"):
        load_fashion_mnist(tmp_path, dict.fromkeys(fashion_mnist.SHA256, sha256(content)))


@pytest.mark.parametrize("name", ["npz", "cifar10", "fashion_mnist"])
def test_places_that_hold_no_data_are_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path)
    monkeypatch.setattr(fashion_mnist, "URL", "nonsense")
    monkeypatch.setattr(download, "PAUSE", 0)
    with pytest.raises(UserError, match="pipe', which is neither a file nor a folder"):
        load_source(name, tmp_path / "pipe")
    with pytest.raises(UserError, match=r"can't be used \(File name too long\)"):
        load_source(name, tmp_path / ("x" * 300))
    for path in ("file", "folder"):
        with pytest.raises(UserError, match=f"{path} .*(no complete|lacks)|can't be downloaded"):
            load_source(name, tmp_path / path)


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cifar, "_head", denied)
    (tmp_path / "test_batch.bin").touch()
    with pytest.raises(UserError, match=r"data path is '.*', which can't be used \(Permission denied\)"):
        load_source("cifar10", tmp_path)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    return prepared_in(tmp_path)


def changed_meta(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads((folder / "dataset.json").read_text())
    change(content)
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("'name': Input should be a valid string", lambda c: c.update(name=3)),
        ("'tasks.first.0': Input should be a valid integer", lambda c: c["tasks"].update(first=["1", 0, 0])),
        ("'tasks.first.0': Input should be greater", lambda c: c["tasks"].update(first=[-1, 0, 0])),
        ("'arrays.gate_y.shape.0': Input should be greater", lambda c: shape(c, "gate_y", [-6])),
        ("'mean.0': Input should be a finite number", lambda c: c["mean"].__setitem__(0, float("nan"))),
        ("'std': Field required", lambda c: c.pop("std")),
        ("std has 3 values, not 2", lambda c: c["std"].append(1.0)),
        ("task 'first' has 2 values, not 3", lambda c: c["tasks"].update(first=[0, 1])),
        ("its arrays are ", lambda c: c["arrays"].pop("gate_y")),
        ("its arrays are .* …", lambda c: c["arrays"].update(dict.fromkeys(["x" * 9999, "y"], c["arrays"]["gate_y"]))),
        (r"gate_x has shape \(6, 3, 7\) in float32, not \(6, 2, 7\)", lambda c: shape(c, "gate_x", [6, 3, 7])),
        (r"gate_x has shape \(6, 2, 7\) in float32, not \(7, 2, 7\)", lambda c: shape(c, "gate_y", [7])),
        (r"gate_y has shape \(6, 2\) in int64, not \(6,\)", lambda c: shape(c, "gate_y", [6, 2])),
        (r"train_x has shape \(48,\)", lambda c: shape(c, "train_x", [48])),
        ("float64, not .* in float32", lambda c: c["arrays"]["gate_x"].update(dtype="float64")),
    ],
)
def test_a_description_that_is_not_one_is_refused(
    prepared: Path, message: str, change: Callable[[dict[str, Any]], object]
) -> None:
    with pytest.raises(
        UserError, match=rf"^\S+dataset.json is missing or damaged \(.*{message}.*dvc repro prepare`$"
    ) as refused:
        load_meta(changed_meta(prepared, change))
    assert len(str(refused.value)) < 500


def shape(content: dict[str, Any], key: str, shape: list[int]) -> None:
    content["arrays"][key]["shape"] = shape


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "null", '{"name": "' + "x" * (1 << 24) + '"}', "\x1b[2J\n"])
def test_a_description_of_absurd_size_or_depth_is_refused_in_one_line(prepared: Path, content: str) -> None:
    (prepared / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset.json is missing or damaged") as refused:
        load_meta(prepared)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 500


def test_labels_beyond_the_classes_are_refused(prepared: Path) -> None:
    arrays = safetensors.numpy.load_file(prepared / "fit.safetensors")
    arrays["gate_y"][3] = 3
    safetensors.numpy.save_file(arrays, prepared / "fit.safetensors")
    changed_meta(prepared, lambda c: c["arrays"]["gate_y"].update(sha256=sha256(arrays["gate_y"].data)))
    with pytest.raises(UserError, match=r"fit.safetensors is .* \(gate_y has labels from 0 to 3, not 0\.\.2\)"):
        load_fit(prepared)


def test_prepared_files_of_other_kinds_are_refused(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "LARGEST", 1000)
    with pytest.raises(UserError, match=r"fit.safetensors is .* \(it has 4,\d+ bytes\)"):
        load_fit(prepared)
    for file in ("fit.safetensors", "dataset.json"):
        (prepared / file).unlink()
        os.mkfifo(prepared / file)
        with pytest.raises(UserError, match=rf"{file} is missing or damaged \(there is no such file\)"):
            load_fit(prepared)


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({"size": "9" * 30}, f"{int('9' * 30):,} bytes are claimed for a member"),
        ({"GNU.sparse.map": "0,nan", "GNU.sparse.size": "1"}, "invalid literal for int"),
    ],
)
def test_what_a_cifar_archive_claims_of_a_member_is_not_believed(
    tmp_path: Path, headers: dict[str, str], why: str
) -> None:
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("other")
        member.pax_headers = headers
        archive.addfile(member)
    with pytest.raises(UserError, match=rf"cifar.tar.gz is no complete .tar.gz archive \({why}"):
        cifar.load_cifar(tmp_path / "cifar.tar.gz", SMALL)
