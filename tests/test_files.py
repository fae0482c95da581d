"""A file is complete or untouched, whatever happens while it is written."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from phasegate.errors import UserError
from phasegate.files import read_json, sha256, write_atomic
from phasegate.table_files import read_table


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.txt"
    write_atomic(path, "old ü")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"file.txt can't be written \(No space left on device\): what .* intact$"):
        write_atomic(path, b"new")
    assert path.read_text(encoding="utf-8") == "old ü" and list(path.parent.iterdir()) == [path]
    assert sha256(path) == sha256("old ü".encode())


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_process_killed_while_it_writes_leaves_the_old_file_or_the_new_one(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "file.bin"
    write_atomic(path, "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from phasegate.files import write_atomic\n"
        "def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n"
        "if sys.argv[1] == 'before': os.fsync = die\n"
        "if sys.argv[1] == 'during': Path.replace = die\n"
        "if sys.argv[1] == 'after': Path.unlink = die\n"
        "write_atomic(Path('file.bin'), 'new' * 100_000)"
    )
    done = subprocess.run([sys.executable, "-c", code, moment], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == ("new" * 100_000 if moment == "after" else "old")


def test_a_full_disk_is_named_and_costs_nothing_that_was_there(small_disk: Path) -> None:
    path = small_disk / "file.bin"
    write_atomic(path, b"o" * 20_000)
    with pytest.raises(UserError, match=r"^/.*file.bin can't be written \(No space left on device\)"):
        write_atomic(path, b"n" * 60_000)
    assert path.read_bytes() == b"o" * 20_000 and list(small_disk.iterdir()) == [path]
    write_atomic(path, b"n" * 20_000)


def test_a_read_only_disk_is_named(small_disk: Path) -> None:
    write_atomic(small_disk / "file.txt", "old")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for path in (small_disk / "file.txt", small_disk / "new/file.txt"):
        with pytest.raises(UserError, match=rf"^{path} can't be written \(Read-only file system\)"):
            write_atomic(path, "new")
    assert (small_disk / "file.txt").read_text() == "old"


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(UserError, match=r"models/x can't be written \((Not a directory|File exists)\)"):
        write_atomic(tmp_path / "models/x", "new")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b" " * (1 << 20) + b"{}", b"1" * 5000, None])
def test_a_damaged_json_file_is_named_in_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"x\.json is missing: `dvc repro`"):
        read_json(path)
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(
        UserError,
        match=r"^\S+x\.json (is damaged \([^\n]+\): `dvc repro`|has more than 1,048,576|can't be read: it is)[^\n]+$",
    ) as error:
        read_json(path)
    assert len(str(error.value)) < 300


NO_TABLES = [b"", b"\n\n", b"\xff\xfe\x00\x01", b'a,b\n1,"2\n', b"a,b\n1,2\n1,2,3,4\n", b"a,c\n1,2\n", None]


@pytest.mark.parametrize("content", NO_TABLES)
def test_a_damaged_table_is_named_in_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.csv"
    with pytest.raises(UserError, match=r"x\.csv is missing: `dvc repro`"):
        read_table(path)
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"^\S+x\.csv (is damaged \([^\n]+\): `dvc repro`|can't be read: it is)[^\n]+$"):
        read_table(path, ["a", "b"])
