"""Name the files of a trial's folder, and read and write what says that the trial failed.

A trial fails when a number stops being finite. `failure.json` and the last good checkpoint are then all that it leaves.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from phasegate.base.errors import UserError, first_finding
from phasegate.base.files import read_bounded, write_atomic

FAILURE, LAST_GOOD = "failure.json", "last_good"
CURVE, SURGERIES, LOADS = "curve.csv", "surgeries.csv", "loads.csv"
SECONDS, MACHINE = "seconds.txt", "machine.txt"  # of the training: kept beside the result, and never a part of it
SURGERY_COLUMNS = ["step", "block", "operation", "expert", "parent", "n_routed_before", "n_routed_after"]
SURGERY_COLUMNS += ["dead", "output_change", "accuracy_before", "accuracy_after", "routing_kl", "recovery_steps"]
LOAD_COLUMNS = ["step", "block", "expert", "share"]
FAILURE_COLUMNS = ["phase", "arm", "seed", "step", "reason"]


@dataclass(frozen=True)
class Failure:
    """Say where and why a trial failed."""

    phase: str
    arm: str
    seed: int
    step: int  # of the trial's training; 0 where it could not begin
    reason: str

    def __str__(self) -> str:
        arm = f"{self.arm}, " if self.arm else ""
        return f"{self.phase}, {arm}seed {self.seed}, step {self.step}: {self.reason}"


def write_failure(folder: Path, failure: Failure) -> None:
    """Write into a trial's folder that the trial failed."""
    write_atomic(folder / FAILURE, json.dumps(asdict(failure), indent=2) + "\n")


def read_failure(folder: Path) -> Failure | None:
    """Return the failure of a trial, or None if it did not fail; `UserError` if the file is damaged."""
    path = folder / FAILURE
    if not path.exists():
        return None
    try:
        return TypeAdapter(Failure).validate_json(read_bounded(path), strict=True)
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_finding(error)}): `dvc repro` makes it again") from None


def finished(folders: Iterable[Path]) -> list[Path]:
    """Return the folders whose trials did not fail; `UserError` if all of them failed."""
    failures = {folder: read_failure(folder) for folder in folders}
    if all(failures.values()):
        raise UserError(f"all {len(failures)} trials failed; the first: {next(iter(failures.values()))}")
    return [folder for folder, failure in failures.items() if failure is None]
