"""Load Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) from a local folder, Debian or its public home."""

import gzip
import io
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pooch

from phasegate.base.errors import UserError
from phasegate.base.files import refuse_special, sha256
from phasegate.data_sets.raw import Raw
from phasegate.records.prepared import Array, Split

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
RETRIES = 3  # of a download that fails
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
SHA256 = {  # of the uncompressed files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
LARGEST = 1 << 26  # bytes of a file, compressed or not: the largest has 47,040,016
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class BoundedFile(io.BufferedWriter):
    """Write a file of at most `LARGEST` bytes, then raise OSError."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.tell() + len(data) > LARGEST:
            raise OSError(f"it has more than {LARGEST:,} bytes")
        return super().write(data)


def load(raw_dir: Path, hashes: Mapping[str, str] = SHA256) -> Raw:
    """Load 60,000 train and 10,000 test images, x (N, 1, 28, 28) in uint8; `raw_dir` keeps downloads."""
    train_x, train_y, test_x, test_y = (_find(raw_dir / "fashion_mnist", name, hashes[name]) for name in SHA256)
    parts = ((train_x, train_y), (test_x, test_y))
    train, test = (Split(x.reshape(-1, 1, 28, 28), y.astype(np.int64)) for x, y in parts)
    return Raw(train, test, class_names=CLASSES)


def _find(folder: Path, name: str, expected: str) -> Array:
    """Return the bytes of the first of the three places that has the file."""
    local = folder / f"{name}.gz"
    for path in (local, DEBIAN / local.name):
        if path.is_file():
            return _read(path, expected)
    refuse_special(local)
    try:
        home = pooch.create(folder, URL, registry={local.name: None}, retry_if_failed=RETRIES)
        home.fetch(local.name, downloader=_download)
        return _read(local, expected)
    except (OSError, UserError) as error:
        if other := isinstance(error, UserError):
            local.unlink()
        cause = "other content" if other else type(error).__name__
        raise UserError(
            f"{local.name} of Fashion-MNIST can't be downloaded ({cause}): put it into {folder},"
            f" install Debian's package dataset-fashion-mnist, or run where {URL} is in reach"
        ) from error


def _download(url: str, path: str, _: pooch.Pooch) -> None:
    with BoundedFile(io.FileIO(path, "w")) as file:
        pooch.HTTPDownloader(headers={"Accept-Encoding": "identity"})(url, file, None)


def _read(path: Path, expected: str) -> Array:
    """Return the bytes of a gzipped idx file after its header, which has four bytes and four for each axis."""
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no complete gzip file ({error}): delete it to have it fetched again") from error
    if len(content) > LARGEST:
        raise UserError(f"{path} has more than {LARGEST:,} bytes uncompressed: delete it to have it fetched again")
    if (found := sha256(content)) != expected:
        raise UserError(f"{path} has sha256 {found} uncompressed, not {expected}: delete it to have it fetched again")
    return np.frombuffer(content, np.uint8, offset=16 if "images" in path.name else 8)
