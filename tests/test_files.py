"""A file is complete or untouched, whatever happens while it is written."""

import errno
import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pandas as pd
import pytest

from phasegate.base.errors import UserError
from phasegate.base.files import read_json, sha256, write_atomic
from phasegate.records.tables import read_table, write_table


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
    with pytest.raises(UserError, match=r"file.txt/x can't be written \((Not a directory|File exists)\)"):
        write_atomic(path / "x", "new")


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_a_killed_process_leaves_the_old_file_or_the_new_one(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "file.bin"
    write_atomic(path, "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from phasegate.base.files import write_atomic\n"
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


def test_tables_come_back_with_names_that_look_like_nothing_and_blank_numbers(tmp_path: Path) -> None:
    arms = ["null", "NA", "None", "nan", "true", "inf", "7"]
    accuracy = [1 / 3, float("nan"), float("inf"), -float("inf"), 1e-20, 0.0, 97.65625]
    table = pd.DataFrame(
        {"arm": arms, "class": arms[::-1], "reason": [*arms[:4], None, "", "x"], "seed": range(7), "accuracy": accuracy}
    )
    write_table(tmp_path / "full.csv", table, digits=None)
    assert (tmp_path / "full.csv").read_text() == table.to_csv(index=False)
    read = read_table(tmp_path / "full.csv")
    assert read["arm"].tolist() == read["class"].tolist()[::-1] == arms and read["reason"].tolist()[:4] == arms[:4]
    assert read["reason"].isna().tolist() == [False] * 4 + [True, True, False]
    pd.testing.assert_frame_equal(read[["seed", "accuracy"]], table[["seed", "accuracy"]])
    write_table(tmp_path / "short.csv", table)
    assert (tmp_path / "short.csv").read_text() == table.to_csv(index=False, float_format="%.10g")
    for arm in arms:
        write_table(tmp_path / "one.csv", table[table["arm"] == arm])
        assert read_table(tmp_path / "one.csv")[["arm", "class"]].values.tolist() == [[arm, arms[-1 - arms.index(arm)]]]


NO_JSON = [b"", b"{", b"\xff", b"[" * 100_000, b" " * (1 << 20) + b"{}", b"1" * 5000, None]
NO_TABLES = [b"", b"\n\n", b"\xff\xfe\x00\x01", b'a,b\n1,"2\n', b"a,b\n1,2\n1,2,3,4\n", b"a,c\n1,2\n", None]


@pytest.mark.parametrize(("name", "content"), [*product(["x.json"], NO_JSON), *product(["x.csv"], NO_TABLES)])
def test_a_damaged_file_is_named_in_one_sentence(tmp_path: Path, name: str, content: bytes | None) -> None:
    def read() -> object:
        return read_json(path) if name == "x.json" else read_table(path, ["a", "b"])

    path = tmp_path / name
    with pytest.raises(UserError, match=rf"{name} is missing: `dvc repro`"):
        read()
    path.mkdir() if content is None else path.write_bytes(content)
    said = r"is damaged \([^\n]+\): `dvc repro`|has more than 1,048,576|can't be read: it is"
    with pytest.raises(UserError, match=rf"^\S+{name} ({said})[^\n]+$") as error:
        read()
    assert len(str(error.value)) < 300
