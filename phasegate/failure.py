"""Trials that failed: what a folder holds instead of a finished trial, so that no stage takes one for the other.

A trial fails when a loss, a gradient or a parameter stops being finite. Its folder then holds `failure.json` and the
last good checkpoint, in `last_good/`, but no checkpoint of its own.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from phasegate.errors import UserError
from phasegate.files import read_json, write_atomic

FAILURE, LAST_GOOD = "failure.json", "last_good"
FAILURE_COLUMNS = ["phase", "arm", "seed", "step", "reason"]


@dataclass(frozen=True)
class Failure:
    """Where and why a trial failed."""

    phase: str
    arm: str
    seed: int
    step: int  # of the trial's training; 0 where it could not begin
    reason: str

    def __str__(self) -> str:
        where = f"{self.phase}, {self.arm}, seed {self.seed}" if self.arm else f"{self.phase}, seed {self.seed}"
        return f"{where}, step {self.step}: {self.reason}"


def write_failure(folder: Path, failure: Failure) -> None:
    """Say in a trial's folder that it failed."""
    write_atomic(folder / FAILURE, json.dumps(asdict(failure), indent=2) + "\n")


def read_failure(folder: Path) -> Failure | None:
    """The failure of a trial; None if it did not fail.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / FAILURE
    if not path.exists():
        return None
    content = read_json(path)
    try:
        values = {name: content[name] for name in Failure.__annotations__}
        if wrong := [name for name, kind in Failure.__annotations__.items() if type(values[name]) is not kind]:
            raise ValueError(f"{wrong[0]} is {type(values[wrong[0]]).__name__}")
        return Failure(**values)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): `dvc repro` makes it again") from None


def finished(folders: Iterable[Path]) -> list[Path]:
    """Those of some trials' folders that do not hold a failure.

    Raises:
        UserError: if all of them do, with the first.
    """
    failures = {folder: read_failure(folder) for folder in folders}
    left = [folder for folder, failure in failures.items() if failure is None]
    if not left:
        raise UserError(f"all {len(failures)} trials failed; the first: {next(iter(failures.values()))}")
    return left
