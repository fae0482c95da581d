"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747), from a local folder, Debian or its public home."""

import gzip
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from phasegate.data import Array, Split
from phasegate.errors import UserError
from phasegate.files import sha256
from phasegate.sources.raw import Raw

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
SHA256 = {  # of the uncompressed files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
LARGEST = 1 << 26  # bytes of a file, compressed or not: the largest has 47,040,016
CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def load_fashion_mnist(raw_dir: Path, hashes: Mapping[str, str] = SHA256) -> Raw:
    """Load 60,000 train and 10,000 test images, x (N, 1, 28, 28) in uint8; `raw_dir` keeps downloads.

    `hashes` are those of the uncompressed files. Raises UserError if one can't be had or has another hash.
    """
    train_x, train_y, test_x, test_y = (_file(raw_dir, name, hashes[name]) for name in SHA256)
    return Raw(Split(train_x[:, None], train_y), Split(test_x[:, None], test_y), class_names=CLASSES)


def _file(raw_dir: Path, name: str, expected: str) -> Array:
    """The array in the first of the three places that has the file."""
    local = raw_dir / "fashion_mnist" / f"{name}.gz"
    for path in (local, DEBIAN / local.name):
        if path.is_file():
            return _read_idx(path, expected)
    _download(local, expected)
    return _read_idx(local, expected)


def _download(local: Path, expected: str) -> None:
    """Download to `local`, where nothing but the expected content arrives; a part waits beside it for the rest."""
    from phasegate.sources.download import download

    partial = local.with_name(f".{local.name}.part")
    try:
        download(f"{URL}/{local.name}", partial, LARGEST)
    except OSError as error:
        raise _not_downloaded(local, type(error).__name__) from error
    try:
        _read_idx(partial, expected)
    except UserError as error:
        partial.unlink()
        raise _not_downloaded(local, "other content") from error
    partial.replace(local)


def _not_downloaded(local: Path, cause: str) -> UserError:
    return UserError(
        f"{local.name} of Fashion-MNIST can't be downloaded ({cause}): put it into {local.parent},"
        f" install Debian's package dataset-fashion-mnist, or run where {URL} is in reach"
    )


def _read_idx(path: Path, expected: str) -> Array:
    """Read a gzipped idx file of bytes: images (N, H, W) in uint8, labels (N,) in int64."""
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no complete gzip file ({error}): delete it to have it fetched again") from error
    if len(content) > LARGEST:
        raise UserError(f"{path} has more than {LARGEST:,} bytes uncompressed: delete it to have it fetched again")
    if (found := sha256(content)) != expected:
        raise UserError(f"{path} has sha256 {found} uncompressed, not {expected}: delete it to have it fetched again")
    axes = 3 if "images" in path.name else 1
    start = 4 + 4 * axes  # after 0, 0, 8 (unsigned bytes), number of axes, their lengths as big-endian integers
    lengths = [int.from_bytes(content[at : at + 4]) for at in range(4, start, 4)]
    if content[:4] != bytes([0, 0, 8, axes]) or math.prod(lengths) != len(content) - start:
        raise UserError(f"{path} is no idx file of bytes with {axes} axes: delete it to have it fetched again")
    array = np.frombuffer(content, np.uint8, offset=start).reshape(lengths)
    return array.astype(np.int64) if axes == 1 else array
