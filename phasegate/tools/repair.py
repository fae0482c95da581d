"""Clear away what a killed DVC left behind: the next `dvc repro` would refuse to begin. `make repro` runs this.

DVC writes `dvc.lock` and `.dvc/tmp/rwlock`, the list of paths in use, in place: a kill may cut them off. Nothing is
lost with them, since finished stages return from DVC's cache of runs. The list also names the processes that use the
paths, and another program may have got the number of a process that is gone.
"""

import json
import re
import sqlite3
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from dvc.dvcfile import LOCK_FILE, Lockfile
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.rwlock import RWLOCK_FILE, SCHEMA
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.utils.serialize import parse_yaml
from voluptuous import Invalid

from phasegate.base.errors import UserError, one_line, report_user_errors
from phasegate.base.files import write_atomic
from phasegate.tools.command import refuse_conflicts

BEGINNING = "schema: '2.0'\nstages:\n"  # of a dvc.lock


def repair(folder: Path) -> list[Path]:
    """Move files that are empty or cut off to `.dvc/tmp/<name>.damaged`, and return where they were.

    In the list of paths in use, processes that are gone are forgotten. Raises LockError if DVC is at work here, and
    UserError if git left the marks of a merge conflict in a file of DVC's, or DVC can't work here at all.
    """
    refuse_conflicts(folder)
    try:
        repo = Repo(folder)
        with repo.lock:
            return _repair(repo, folder / LOCK_FILE, folder / ".dvc/tmp" / RWLOCK_FILE)
    except LockError:
        raise
    except (DvcException, sqlite3.Error) as error:  # no git, no .dvc, a broken configuration, a full disk
        raise UserError(f"DVC can't work here: {one_line(error)}") from None


def _repair(repo: Repo, lock_file: Path, in_use: Path) -> list[Path]:
    damaged = []
    try:
        Lockfile(repo, str(lock_file)).load()
    except DvcException:
        if is_cut_off(lock_file.read_bytes().decode(errors="replace")):
            damaged.append(lock_file)
    text = in_use.read_text(encoding="utf-8", errors="replace") if in_use.exists() else "{}"
    try:
        with suppress(Invalid):  # DVC says so
            if (kept := without_gone(listed := SCHEMA(json.loads(text)))) != listed:
                write_atomic(in_use, json.dumps(kept))
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            damaged.append(in_use)
    for path in damaged:
        path.replace(in_use.with_name(f"{path.name}.damaged"))
    return damaged


def is_cut_off(text: str) -> bool:
    """Tell whether a `dvc.lock` that DVC refuses is whole up to its last stage."""
    whole = "".join(re.split(r"^(?=  \S)", text, flags=re.MULTILINE)[:-1]) or BEGINNING
    if whole == BEGINNING:
        return text.startswith(BEGINNING) or BEGINNING.startswith(text)
    try:
        COMPILED_LOCKFILE_SCHEMA(parse_yaml(whole, LOCK_FILE))
    except Exception:  # those of the parser and of the schema share no base class
        return False
    return True


def without_gone(listed: dict[str, Any]) -> dict[str, Any]:
    """Return a list of paths in use without the processes that are gone: one writes a path, several may read it."""
    read = {path: left for path, owners in listed["read"].items() if (left := [*filter(lives, owners)])}
    return {"write": {path: owner for path, owner in listed["write"].items() if lives(owner)}, "read": read}


def lives(owner: dict[str, Any]) -> bool:
    """Tell whether the process that DVC noted still runs: its number, with the name and arguments of its program."""
    program, _, arguments = re.sub(r"^.*/(\w+)/__main__\.py", r"\1", str(owner["cmd"])).partition(" ")  # python -m dvc
    try:
        return " ".join(psutil.Process(owner["pid"]).cmdline()).endswith(f"{Path(program).name} {arguments}".strip())
    except psutil.Error as error:  # it is gone, or dead and not yet buried, or another user's
        return isinstance(error, psutil.AccessDenied)


if __name__ == "__main__":
    with report_user_errors("repair"), suppress(LockError):  # `dvc repro` will name the process that is at work
        for path in repair(Path()):
            print(f"{path} was cut off, perhaps by a kill: it is put aside in .dvc/tmp", file=sys.stderr)
