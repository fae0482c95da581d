"""Load CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in their binary version: the .tar.gz archive or its folder."""

import gzip
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from phasegate.base.errors import UserError
from phasegate.base.files import read_bounded
from phasegate.data_sets.raw import Raw
from phasegate.records.prepared import Array, Split

IMAGE = (3, 32, 32)
MAX_TEXT = 65_536  # bytes in a file of label names, a generous bound
LARGEST = 1 << 28  # bytes in an archive, decompressed: both have 176 MiB, but a small file can hold terabytes of zeros


@dataclass(frozen=True)
class CifarFormat:
    """Describe a binary archive; a record has a byte per kind of label (coarse, fine), then the pixels."""

    folder: str
    train: Mapping[str, int]  # file -> records in it
    test: Mapping[str, int]
    names: Mapping[str, int]  # file of label names, one a line -> labels; a file per kind of label

    @property
    def sizes(self) -> dict[str, int]:
        """Return the exact size in bytes of every file of records."""
        record = len(self.names) + int(np.prod(IMAGE))
        return {file: records * record for file, records in {**self.train, **self.test}.items()}

    @property
    def limits(self) -> dict[str, int]:
        """Return the most bytes that are read of every file."""
        return self.sizes | dict.fromkeys(self.names, MAX_TEXT)


class BoundedGzip(gzip.GzipFile):
    """Read at most `LARGEST` bytes of a gzip file, then raise OSError."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > LARGEST:
            raise OSError(f"more than {LARGEST:,} bytes when decompressed")
        return super().read(size)


BATCHES = {f"data_batch_{batch}.bin": 10_000 for batch in range(1, 6)}
CIFAR10 = CifarFormat("cifar-10-batches-bin", BATCHES, {"test_batch.bin": 10_000}, {"batches.meta.txt": 10})
NAMES = {"coarse_label_names.txt": 20, "fine_label_names.txt": 100}
CIFAR100 = CifarFormat("cifar-100-binary", {"train.bin": 50_000}, {"test.bin": 10_000}, NAMES)


def load_cifar(path: Path, form: CifarFormat) -> Raw:
    """Load x (N, 3, 32, 32) in uint8 and the fine labels; the coarse ones, if any, become the task `coarse`.

    `path` is the archive or its extracted folder. Only the expected files are read, and none is unpacked to disk.
    """
    files = _read_folder(path, form) if path.is_dir() else _read_archive(path, form)
    if missing := sorted({*form.limits} - {*files}):
        raise UserError(f"{path} lacks {', '.join(missing)} in {form.folder}: get the binary version again")
    for file, size in form.sizes.items():
        if len(files[file]) != size:
            raise UserError(f"{file} in {path} has {len(files[file])} bytes, not {size}: get the archive again")
    for file, labels in form.names.items():
        names = tuple(filter(str.strip, files[file].decode(errors="replace").splitlines()))
        if len(names) != labels:
            raise UserError(f"{file} in {path} has {len(names)} label names, not {labels}: get the archive again")
    train_x, train_y = _parse_records(path, form, [files[file] for file in form.train])
    test_x, test_y = _parse_records(path, form, [files[file] for file in form.test])
    tasks = {}
    if len(form.names) == 2:
        pairs = np.unique(np.concatenate([train_y, test_y]), axis=0)
        coarse, fine = pairs[pairs[:, 1].argsort()].T
        if len(double := fine[1:][np.diff(fine) == 0]):
            raise UserError(f"{path} gives fine label {double[0]} two coarse labels: get the archive again")
        tasks["coarse"] = coarse.tolist()
    return Raw(Split(train_x, train_y[:, -1]), Split(test_x, test_y[:, -1]), class_names=names, tasks=tasks)


def _read_folder(path: Path, form: CifarFormat) -> dict[str, bytes]:
    folder = path / form.folder if (path / form.folder).is_dir() else path
    return {file: read_bounded(folder / file, most) for file, most in form.limits.items() if (folder / file).is_file()}


def _read_archive(path: Path, form: CifarFormat) -> dict[str, bytes]:
    """Read the expected files in one pass over the archive."""
    wanted = {PurePosixPath(form.folder, file): limit for file, limit in form.limits.items()}
    files: dict[str, bytes] = {}
    try:
        with BoundedGzip(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if member.size > LARGEST:  # tarfile would read beyond the end of the file without end
                    raise OSError(f"{member.size:,} bytes are claimed for a member")
                name = PurePosixPath(member.name)
                if name not in wanted:
                    continue
                content = archive.extractfile(member) if member.isreg() else None
                if content is None or member.size > wanted[name]:
                    raise UserError(f"{name} in {path} is a link or too large: get the archive again")
                files[name.name] = content.read()
            while stream.read(MAX_TEXT):  # to the end, where gzip compares its checksum
                pass
    except UserError:
        raise
    except Exception as error:  # gzip, zlib and tarfile share no base class for what a damaged file raises
        raise UserError(f"{path} is no complete .tar.gz archive ({error}): get the archive again") from error
    return files


def _parse_records(path: Path, form: CifarFormat, contents: list[bytes]) -> tuple[Array, Array]:
    """Return pixels (N, 3, 32, 32) in uint8, and labels (N, kinds of label) in int64, checked."""
    kinds = len(form.names)
    rows = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, kinds + int(np.prod(IMAGE)))
    labels = rows[:, :kinds].astype(np.int64)
    for kind, classes in enumerate(form.names.values()):
        present = np.unique(labels[:, kind])
        if not np.array_equal(present, np.arange(classes)):
            raise UserError(
                f"{path} has {len(present)} different labels from {present[0]} to {present[-1]},"
                f" not 0..{classes - 1}: get the archive again"
            )
    return rows[:, kinds:].reshape(-1, *IMAGE), labels
