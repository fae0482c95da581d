"""Data sets are the published ones, to the byte, and anything else is refused."""

import gzip
import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest

from phasegate.errors import UserError
from phasegate.files import sha256
from phasegate.prepare import split_validation
from phasegate.sources import download, fashion_mnist, load_fashion_mnist, load_mnist1d, load_source
from phasegate.sources.cifar import CIFAR10, CIFAR100, CifarFormat, load_cifar

SMALL = CifarFormat("cifar", {"train.bin": 8}, {"test.bin": 4}, {"coarse.txt": 2, "fine.txt": 4})


def test_mnist1d_is_the_published_one_and_leaves_the_global_generators_alone() -> None:
    draws = []
    for load in (lambda: None, load_mnist1d):
        random.seed(7)
        np.random.seed(7)
        raw = load()  # load_mnist1d checks every published hash itself
        draws.append((random.random(), np.random.rand()))
    assert draws[0] == draws[1] and raw is not None
    train, signal, gate = split_validation(raw, 6000, np.random.default_rng(0))
    assert train.x.shape == (4000, 1, 40) and raw.test.x.shape == (1000, 1, 40)
    assert (np.bincount(signal.y) == 100).all() and (np.bincount(gate.y) == 100).all()


@pytest.mark.skipif(not fashion_mnist.DEBIAN.exists(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_is_the_published_one(tmp_path: Path) -> None:
    raw = load_fashion_mnist(tmp_path)
    assert raw.train.x.shape == (60_000, 1, 28, 28) and (np.bincount(raw.test.y) == 1000).all()


def test_fashion_mnist_is_read_only_if_it_is_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "fashion_mnist").mkdir()
    hashes = {}
    for name in fashion_mnist.SHA256:
        shape = (12, 28, 28) if "images" in name else (12,)
        pixels = (np.arange(np.prod(shape)) % 10).astype(np.uint8)
        content = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes() + pixels.tobytes()
        (tmp_path / "fashion_mnist" / f"{name}.gz").write_bytes(gzip.compress(content))
        hashes[name] = sha256(content)
    raw = load_fashion_mnist(tmp_path, hashes)
    assert raw.test.x.shape == (12, 1, 28, 28) and raw.test.x[0, 0, 1, 1] == 9 and raw.train.y[9] == 9
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz has sha256 .* not c59f468a"):
        load_fashion_mnist(tmp_path)


def test_without_fashion_mnist_the_ways_to_get_it_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path)
    monkeypatch.setattr(fashion_mnist, "URL", "http://127.0.0.1:1")  # nobody listens there
    monkeypatch.setattr(download, "PAUSE", 0)
    with pytest.raises(UserError, match=r"put it into .*, install .*dataset-fashion-mnist, or run where"):
        load_fashion_mnist(tmp_path)
    assert not (tmp_path / "fashion_mnist").exists()


@pytest.mark.parametrize("name", ["npz", "cifar10", "cifar100"])
@pytest.mark.parametrize("keep", [0, 100, 3000])
def test_foreign_and_truncated_files_are_refused(tmp_path: Path, name: str, keep: int) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, x_train=np.zeros((60, 9)))
    content = buffer.getvalue() if name == "npz" else gzip.compress(np.random.default_rng(0).bytes(4000))
    (tmp_path / "file").write_bytes(content[:keep])
    with pytest.raises(UserError, match="file is no complete"):
        load_source(name, tmp_path / "file")
    with pytest.raises(UserError, match="which does not exist"):
        load_source(name, tmp_path / "absent")


def cifar_files() -> dict[str, bytes]:
    rows = [np.array([label // 2, label, *range(256)] + [0] * 2816, np.uint8).tobytes() for label in range(4)]
    names = {"coarse.txt": b"a\nb\n\n", "fine.txt": b"c\nd\ne\nf\n"}
    return {"train.bin": b"".join(rows * 2), "test.bin": b"".join(rows)} | names


def cifar_archive(path: Path, files: dict[str, bytes], link: str = "") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar/{name}")
            member.type, member.linkname = (tarfile.SYMTYPE, "elsewhere") if name == link else (tarfile.REGTYPE, "")
            member.size = 0 if name == link else len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_cifar_archives_and_their_folders_read_alike(tmp_path: Path) -> None:
    (tmp_path / "cifar").mkdir()
    for name, content in cifar_files().items():
        (tmp_path / "cifar" / name).write_bytes(content)
    archive = cifar_archive(tmp_path / "cifar.tar.gz", {"unexpected": b"!"} | cifar_files())
    for path in (archive, tmp_path, tmp_path / "cifar"):
        raw = load_cifar(path, SMALL)
        assert raw.train.x.shape == (8, 3, 32, 32) and raw.train.x[3, 0, 1, 2] == 34
        assert raw.train.y.tolist() == [0, 1, 2, 3] * 2 and raw.class_names == ("c", "d", "e", "f")
        assert raw.tasks == {"coarse": [0, 0, 1, 1]}
    assert CIFAR10.sizes["test_batch.bin"] == 30_730_000 and CIFAR100.sizes["train.bin"] == 153_700_000


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("test.bin in .* has 12295 bytes, not 12296", {"test.bin": cifar_files()["test.bin"][1:]}),
        ("train.bin in .* is a link or too large", {"train.bin": cifar_files()["train.bin"] + b"!"}),
        ("fine.txt in .* has 1 label names, not 4", {"fine.txt": b"c"}),
        ("gives fine label 0 two coarse labels", {"test.bin": b"\1" + cifar_files()["test.bin"][1:]}),
        (
            r"4 different labels from 0 to 4, not 0\.\.3",
            {"test.bin": cifar_files()["test.bin"].replace(b"\1\3", b"\1\4")},
        ),
    ],
)
def test_wrong_cifar_archives_are_refused(tmp_path: Path, message: str, changed: dict[str, bytes]) -> None:
    with pytest.raises(UserError, match=message):
        load_cifar(cifar_archive(tmp_path / "cifar.tar.gz", cifar_files() | changed), SMALL)


def test_links_and_gaps_in_cifar_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cifar/fine.txt in .* is a link or too large"):
        load_cifar(cifar_archive(tmp_path / "cifar.tar.gz", cifar_files(), link="fine.txt"), SMALL)
    with pytest.raises(UserError, match=r"lacks coarse.txt, test.bin, train.bin in cifar"):
        load_cifar(cifar_archive(tmp_path / "cifar.tar.gz", {"fine.txt": b""}), SMALL)
