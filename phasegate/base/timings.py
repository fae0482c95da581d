"""Keep in `reports/timings.csv` how long trials and stages took, and on which machine; git and DVC ignore the file.

Nothing that they hash depends on the clock or the machine, so the same results are the same bytes everywhere.
"""

import csv
from collections.abc import Mapping
from io import StringIO

from phasegate.base.errors import UserError
from phasegate.base.files import read_bounded, write_atomic
from phasegate.base.paths import TIMINGS

COLUMNS = ("stage", "trial", "seconds", "machine")  # trial is blank in the row of a whole stage
LARGEST = 1 << 26  # bytes
Taken = tuple[float, str]  # seconds, and the machine


def read() -> dict[str, dict[str, Taken]]:
    """Return what trials took, by stage and trial; nothing if the file is missing or damaged: no result needs it."""
    found: dict[str, dict[str, Taken]] = {}
    try:
        for row in csv.DictReader(StringIO(read_bounded(TIMINGS, LARGEST).decode())):
            stage, trial, seconds, machine = (row[column] for column in COLUMNS)
            found.setdefault(stage, {})[trial] = float(seconds), machine
    except (UserError, ValueError, KeyError, TypeError, csv.Error):
        return {}
    return found


def record(stage: str, taken: Mapping[str, Taken]) -> None:
    """Write what the trials of a stage took in place of its earlier trials, or, with the name "", the stage itself."""
    timings = read()
    kept = {trial: row for trial, row in timings.get(stage, {}).items() if bool(trial) == ("" in taken)}
    writer = csv.writer(text := StringIO(), lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, trials in sorted((timings | {stage: kept | dict(taken)}).items()):
        writer.writerows((name, trial, f"{seconds:.3f}", machine) for trial, (seconds, machine) in trials.items())
    write_atomic(TIMINGS, text.getvalue())
