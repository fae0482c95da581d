"""Files that are either complete or absent, and the hashes that tell."""

import glob
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from phasegate.errors import UserError, one_line


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) so that `path` holds all of it, or stays as it was if anything fails.

    Raises:
        UserError: if it can't be written: no space, no permission, a file in the place of a folder.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # beside it: one file system
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror or error}): what it held before is intact") from None


def sha256(source: Path | bytes | memoryview) -> str:
    """The sha256, in hexadecimal, of a file's content or of bytes (an array's: `sha256(array.data)`)."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(source).hexdigest()


def refuse_special(path: Path) -> None:
    """Raises UserError if a path is there, but is no regular file: reading a pipe may wait for ever."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} can't be read: it is no regular file")


def read_bounded(path: Path, at_most: int = 1 << 20) -> bytes:
    """A file's content, of so many bytes at most: more is refused before it is read.

    Raises:
        UserError: if the file is missing, can't be read, is something else than a file, or is larger.
    """
    try:
        refuse_special(path)
        with path.open("rb") as file:
            content = file.read(at_most + 1)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: `dvc repro` runs the stage that writes it") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {one_line(error)}") from None
    if len(content) > at_most:
        raise UserError(f"{path} has more than {at_most:,} bytes: it can't be what it is taken for")
    return content


def read_json(path: Path) -> Any:
    """What a JSON file of at most a megabyte holds.

    Raises:
        UserError: as `read_bounded` does, or if it is not JSON.
    """
    content = read_bounded(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): `dvc repro` makes it again") from None
