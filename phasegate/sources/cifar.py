"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) in their binary version: the .tar.gz archive or its folder."""

import gzip
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from phasegate.data import Array, Split
from phasegate.errors import UserError
from phasegate.sources.raw import Raw

IMAGE = (3, 32, 32)
MAX_TEXT = 65_536  # bytes in a file of label names, a generous bound
LARGEST = 1 << 28  # bytes in an archive, decompressed: both have 176 MiB, but a small file can hold terabytes of zeros


@dataclass(frozen=True)
class CifarFormat:
    """Content of a binary archive; a record has a byte per kind of label (coarse, fine), then the pixels."""

    folder: str
    train: Mapping[str, int]  # file -> records in it
    test: Mapping[str, int]
    names: Mapping[str, int]  # file of label names, one a line -> labels; a file per kind of label

    @property
    def sizes(self) -> dict[str, int]:
        """Exact size in bytes of every file of records."""
        record = len(self.names) + int(np.prod(IMAGE))
        return {file: records * record for file, records in {**self.train, **self.test}.items()}

    @property
    def limits(self) -> dict[str, int]:
        """Most bytes that are read of every file."""
        return self.sizes | dict.fromkeys(self.names, MAX_TEXT)


class Bounded(gzip.GzipFile):
    """A gzip file that fails (OSError) once more than `LARGEST` bytes were read of it."""

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes, decompressed."""
        if self.tell() > LARGEST:
            raise OSError(f"more than {LARGEST:,} bytes when decompressed")
        return super().read(size)


CIFAR10 = CifarFormat(
    folder="cifar-10-batches-bin",
    train={f"data_batch_{batch}.bin": 10_000 for batch in range(1, 6)},
    test={"test_batch.bin": 10_000},
    names={"batches.meta.txt": 10},
)
CIFAR100 = CifarFormat(
    folder="cifar-100-binary",
    train={"train.bin": 50_000},
    test={"test.bin": 10_000},
    names={"coarse_label_names.txt": 20, "fine_label_names.txt": 100},
)


def load_cifar(path: Path, form: CifarFormat) -> Raw:
    """Load x (N, 3, 32, 32) in uint8 and the fine labels; the coarse ones, if any, become the task `coarse`.

    `path` is the archive or its extracted folder. Only the expected files are read, none is unpacked to disk.
    Raises UserError if one of them is missing, a link in the archive, or of another size or content.
    """
    files = _read_folder(path, form) if path.is_dir() else _read_archive(path, form)
    if missing := sorted({*form.sizes, *form.names} - set(files)):
        raise UserError(f"{path} lacks {', '.join(missing)} in {form.folder}: get the binary version again")
    for file, size in form.sizes.items():
        if len(files[file]) != size:
            raise UserError(f"{file} in {path} has {len(files[file])} bytes, not {size}: get the archive again")
    names = [_label_names(path, file, files[file], labels) for file, labels in form.names.items()]
    train_x, train_labels = _records(path, form, [files[file] for file in form.train])
    test_x, test_labels = _records(path, form, [files[file] for file in form.test])
    tasks = {}
    if len(form.names) == 2:
        tasks["coarse"] = _coarse_map(path, np.concatenate([train_labels, test_labels]), len(names[-1]))
    train, test = Split(train_x, train_labels[:, -1]), Split(test_x, test_labels[:, -1])
    return Raw(train, test, class_names=names[-1], tasks=tasks)


def _read_folder(path: Path, form: CifarFormat) -> dict[str, bytes]:
    folder = path / form.folder if (path / form.folder).is_dir() else path
    return {file: _head(folder / file, limit) for file, limit in form.limits.items() if (folder / file).is_file()}


def _head(path: Path, limit: int) -> bytes:
    """The content of a file, and one byte more than the limit if that is exceeded."""
    with path.open("rb") as file:
        return file.read(limit + 1)


def _read_archive(path: Path, form: CifarFormat) -> dict[str, bytes]:
    """Read the expected files in one pass over the archive."""
    wanted = {PurePosixPath(form.folder, file): limit for file, limit in form.limits.items()}
    files: dict[str, bytes] = {}
    try:
        with Bounded(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if member.size > LARGEST:  # tarfile would read on and on, beyond the end of the file
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


def _label_names(path: Path, file: str, content: bytes, labels: int) -> tuple[str, ...]:
    names = tuple(line for line in content[:MAX_TEXT].decode(errors="replace").splitlines() if line.strip())
    if len(names) != labels:
        raise UserError(f"{file} in {path} has {len(names)} label names, not {labels}: get the archive again")
    return names


def _records(path: Path, form: CifarFormat, contents: list[bytes]) -> tuple[Array, Array]:
    """Pixels (N, 3, 32, 32) in uint8, and labels (N, kinds of label) in int64, checked."""
    kinds = len(form.names)
    rows = np.concatenate([np.frombuffer(content, np.uint8) for content in contents])
    rows = rows.reshape(-1, kinds + int(np.prod(IMAGE)))
    labels = rows[:, :kinds].astype(np.int64)
    for kind, classes in enumerate(form.names.values()):
        present = np.unique(labels[:, kind])
        if not np.array_equal(present, np.arange(classes)):
            raise UserError(
                f"{path} has {len(present)} different labels from {present[0]} to {present[-1]},"
                f" not 0..{classes - 1}: get the archive again"
            )
    return rows[:, kinds:].reshape(-1, *IMAGE), labels


def _coarse_map(path: Path, labels: Array, classes: int) -> list[int]:
    """The coarse label of every fine label, from records (N, 2) that must all agree on it."""
    coarse, fine = labels.T
    of_fine = np.zeros(classes, np.int64)
    of_fine[fine] = coarse
    if (wrong := np.flatnonzero(of_fine[fine] != coarse)).size:
        raise UserError(f"{path} gives fine label {fine[wrong[0]]} two coarse labels: get the archive again")
    return [int(label) for label in of_fine]
