"""A file is complete or untouched, whatever happens while it is written."""

import os
from pathlib import Path

import pytest

from phasegate.files import sha256, write_atomic


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.txt"
    write_atomic(path, "old ü")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_text(encoding="utf-8") == "old ü" and list(path.parent.iterdir()) == [path]
    assert sha256(path) == sha256("old ü".encode())
