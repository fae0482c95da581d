"""Read and write files that are either complete or absent, and hash them."""

import glob
import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from phasegate.base import used
from phasegate.base.errors import UserError, one_line


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path`, which keeps its old content if anything fails (`UserError`)."""
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
    """Return the sha256, in hexadecimal, of a file's content or of bytes (of an array: `sha256(array.data)`)."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(source).hexdigest()


def refuse_special(path: Path) -> None:
    """Note a path that will be read; `UserError` if it exists but is no regular file: a pipe may wait for ever."""
    used.note(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} can't be read: it is no regular file")


def read_bounded(path: Path, at_most: int = 1 << 20) -> bytes:
    """Return the content of a file of at most `at_most` bytes; `UserError` if it can't be, or is half merged."""
    try:
        refuse_special(path)
        with path.open("rb") as file:
            content = file.read(at_most + 1)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: `dvc repro` runs the stage that writes it") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {one_line(error)}") from None
    if len(content) > at_most:
        raise UserError(f"{path} has more than {at_most:,} bytes: it is not the file that was expected")
    if re.search(rb"^(<{7} |={7}\r?$|>{7} )", content, re.MULTILINE):
        hint = f"keep one side, as `git checkout --ours {path}` does; `dvc repro` then runs what differs"
        raise UserError(f"{path} has the marks of a merge conflict: {hint}")
    return content


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of at most a megabyte; `UserError` if it is not JSON or cannot be read."""
    content = read_bounded(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): `dvc repro` makes it again") from None
