"""Put aside what a killed DVC left half-written: the next `dvc repro` would refuse to begin. `make repro` runs this.

DVC writes `dvc.lock` and `.dvc/tmp/rwlock`, the list of paths in use, in place. Nothing is lost with them: finished
stages return from DVC's cache of runs.
"""

import json
import sys
from contextlib import suppress
from pathlib import Path

from dvc.dvcfile import LOCK_FILE, Lockfile
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.rwlock import RWLOCK_FILE

from phasegate.base.errors import UserError, report_user_errors


def repair(folder: Path) -> list[Path]:
    """Move files that are empty or cut off to `.dvc/tmp/<name>.damaged`, and return where they were.

    Raises LockError if DVC is at work here, and UserError if git left the marks of a merge conflict in `dvc.lock`.
    """
    repo, lock_file, in_use, damaged = Repo(folder), folder / LOCK_FILE, folder / ".dvc/tmp" / RWLOCK_FILE, []
    with repo.lock:
        try:
            Lockfile(repo, str(lock_file)).load()
        except DvcException:
            if b"<<<<<<< " in lock_file.read_bytes():
                raise UserError(f"{lock_file} has the marks of a merge conflict: resolve it, or take a side") from None
            damaged.append(lock_file)
        try:
            json.loads(in_use.read_bytes() if in_use.exists() else b"{}")
        except ValueError:
            damaged.append(in_use)
        for path in damaged:
            path.replace(in_use.with_name(f"{path.name}.damaged"))
    return damaged


if __name__ == "__main__":
    with report_user_errors("repair"), suppress(LockError):  # `dvc repro` will name the process that is at work
        for path in repair(Path()):
            print(f"{path} was cut off, perhaps by a kill: it is put aside in .dvc/tmp", file=sys.stderr)
