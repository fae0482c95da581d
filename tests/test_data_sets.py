"""Data sets are the published ones, to the byte, and anything else is refused."""

import gzip
import io
import os
import random
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from phasegate.base.errors import UserError
from phasegate.base.files import sha256
from phasegate.data_sets import fashion_mnist, mnist1d
from phasegate.data_sets.cifar import CIFAR10, CIFAR100, CifarFormat, load_cifar
from phasegate.data_sets.prepare import split_validation

SMALL = CifarFormat("cifar", {"train.bin": 8}, {"test.bin": 4}, {"coarse.txt": 2, "fine.txt": 4})


def test_mnist1d_is_the_published_one_and_leaves_the_global_generators_alone() -> None:
    draws = []
    for load in (lambda: None, mnist1d.load):
        random.seed(7)
        np.random.seed(7)
        raw = load()  # mnist1d.load checks every published hash itself
        draws.append((random.random(), np.random.rand()))
    assert draws[0] == draws[1] and raw is not None
    train, signal, gate = split_validation(raw, 6000, np.random.default_rng(0))
    assert train.x.shape == (4000, 1, 40) and raw.test.x.shape == (10_000, 1, 40)
    assert raw.published is not None and raw.published.x.shape == (1000, 1, 40)
    every = np.concatenate([split.x[:, 0] for split in (train, signal, gate, raw.test, raw.published)])
    assert len(np.unique(every, axis=0)) == 17_000  # no example is in two splits
    assert (np.bincount(signal.y) == 100).all() and (np.bincount(gate.y) == 100).all()


@pytest.mark.skipif(not fashion_mnist.DEBIAN.exists(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_is_the_published_one(tmp_path: Path) -> None:
    raw = fashion_mnist.load(tmp_path)
    assert raw.train.x.shape == (60_000, 1, 28, 28) and (np.bincount(raw.test.y) == 1000).all()


def fashion_files(folder: Path) -> dict[str, str]:
    """Write four files of 12 examples, and return the hashes that `fashion_mnist.load` takes."""
    hashes = {}
    folder.mkdir()
    for name in fashion_mnist.SHA256:
        shape = (12, 28, 28) if "images" in name else (12,)
        pixels = (np.arange(np.prod(shape)) % 10).astype(np.uint8)
        content = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes() + pixels.tobytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        hashes[name] = sha256(content)
    return hashes


def test_fashion_mnist_is_read_only_if_it_is_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path)
    raw = fashion_mnist.load(tmp_path, fashion_files(tmp_path / "fashion_mnist"))
    assert raw.test.x.shape == (12, 1, 28, 28) and raw.test.x[0, 0, 1, 1] == 9 and raw.train.y[9] == 9
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz has sha256 .* not c59f468a"):
        fashion_mnist.load(tmp_path)
    path = tmp_path / "fashion_mnist/train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes((1 << 26) + 1), 1))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz has more than 67,108,864 bytes uncompressed"):
        fashion_mnist.load(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz can't be read: it is no regular file"):
        fashion_mnist.load(tmp_path)


class Handler(SimpleHTTPRequestHandler):
    """Refuse the first requests, then serve files."""

    failures = 0

    def do_GET(self) -> None:
        Handler.failures -= 1
        self.send_error(503) if Handler.failures >= 0 else super().do_GET()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder, not there yet, that is served where Fashion-MNIST is downloaded from."""
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "home"))) as server:
        monkeypatch.setattr(fashion_mnist, "URL", f"http://127.0.0.1:{server.server_port}/")
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield tmp_path / "home"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("cause", ["other content", "OSError", "HTTPError", "ConnectionError"])
def test_a_failed_download_leaves_nothing_and_says_what_to_do(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    hashes, Handler.failures = fashion_files(home), fashion_mnist.RETRIES + 1 if cause == "HTTPError" else 0
    match cause:
        case "other content":
            hashes = fashion_mnist.SHA256
        case "OSError":
            monkeypatch.setattr(fashion_mnist, "LARGEST", 50)  # bytes
        case "ConnectionError":
            monkeypatch.setattr(fashion_mnist, "URL", "http://127.0.0.1:1/")  # nobody listens there
    way_out = r"put it into .*, install .*dataset-fashion-mnist, or run where"
    with pytest.raises(UserError, match=rf"-images-idx3-ubyte.gz .* can't be downloaded \({cause}\): {way_out}"):
        fashion_mnist.load(tmp_path, hashes)
    assert not list((tmp_path / "fashion_mnist").iterdir())


def test_a_download_over_a_bad_line_is_tried_again(home: Path, tmp_path: Path) -> None:
    hashes, Handler.failures = fashion_files(home), fashion_mnist.RETRIES
    assert fashion_mnist.load(tmp_path, hashes).test.x.shape == (12, 1, 28, 28)
    assert {path.name for path in (tmp_path / "fashion_mnist").iterdir()} == {f"{name}.gz" for name in hashes}


def cifar_files() -> dict[str, bytes]:
    rows = [np.array([label // 2, label, *range(256)] + [0] * 2816, np.uint8).tobytes() for label in range(4)]
    names = {"coarse.txt": b"a\nb\n\n", "fine.txt": b"c\nd\ne\nf\n"}
    return {"train.bin": b"".join(rows * 2), "test.bin": b"".join(rows)} | names


def cifar_archive(path: Path, files: Mapping[str, bytes | None], folder: str = "cifar", **headers: str) -> Path:
    """Write a .tar.gz of files; those without content are links."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.type, member.linkname = (tarfile.SYMTYPE, "elsewhere") if content is None else (tarfile.REGTYPE, "")
            member.size, member.pax_headers = len(content or b""), headers
            archive.addfile(member, io.BytesIO(content or b""))
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
    assert {*CIFAR10.sizes.values()} == {30_730_000} and {*CIFAR100.sizes.values()} == {153_700_000, 30_740_000}


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("test.bin in .* has 12295 bytes, not 12296", {"test.bin": cifar_files()["test.bin"][1:]}),
        ("train.bin in .* is a link or too large", {"train.bin": cifar_files()["train.bin"] + b"!"}),
        ("^cifar/fine.txt in .* is a link or too large", {"fine.txt": None}),
        ("fine.txt in .* has 1 label names, not 4", {"fine.txt": b"c"}),
        ("gives fine label 0 two coarse labels", {"test.bin": b"\1" + cifar_files()["test.bin"][1:]}),
        (r"4 different .* from 0 to 4, not 0\.\.3", {"test.bin": cifar_files()["test.bin"].replace(b"\1\3", b"\1\4")}),
    ],
)
def test_wrong_cifar_archives_are_refused(tmp_path: Path, message: str, changed: dict[str, bytes | None]) -> None:
    with pytest.raises(UserError, match=message):
        load_cifar(cifar_archive(tmp_path / "cifar.tar.gz", cifar_files() | changed), SMALL)
