"""Take away what DVC has left half-written, if it was killed: with it, the next `dvc repro` would refuse to begin.

DVC writes two files in place, around each stage: `dvc.lock`, and `.dvc/tmp/rwlock`, which lists the paths in use. What
they say, DVC finds out anew: finished stages return from its cache of runs. `make repro` begins with this.
"""

import sys
from contextlib import suppress
from pathlib import Path

from dvc.dvcfile import LOCK_FILE, Lockfile
from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.rwlock import RWLOCK_FILE, RWLockFileCorruptedError, RWLockFileFormatError, rwlock


def mend(folder: Path) -> list[Path]:
    """Put damaged files of DVC's aside, as `.dvc/tmp/<name>.damaged`, and return where they were.

    Raises:
        LockError: if a DVC at work in this repository may be just writing them.
    """
    repo = Repo(folder)
    lock_file, aside = folder / LOCK_FILE, folder / ".dvc/tmp"
    damaged = []
    with repo.lock:
        try:
            Lockfile(repo, str(lock_file)).load()
        except DvcException:
            damaged.append(lock_file)
        try:
            with rwlock(repo.tmp_dir, repo.fs, "mend", [], [], False):
                pass
        except (RWLockFileCorruptedError, RWLockFileFormatError):
            damaged.append(aside / RWLOCK_FILE)
        for path in damaged:
            path.replace(aside / f"{path.name}.damaged")
    return damaged


if __name__ == "__main__":
    with suppress(LockError):  # `dvc repro` will say who is at work
        for path in mend(Path()):
            print(
                f"{path} is damaged, as if DVC was killed while it wrote it: it is put aside in .dvc/tmp",
                file=sys.stderr,
            )
