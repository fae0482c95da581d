"""Measure trials per minute with two workers, against twice the trials of one worker."""

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from bench.step import STEPS, training_case
from bench.timing import Entry, entry, medians
from phasegate.trials import store
from phasegate.trials.run import run_trials
from phasegate.trials.trial import Trial

TRIALS = 8
ROUNDS = 10  # of so many steps in each trial


def entries(rounds: int) -> Iterator[Entry]:
    """Measure one entry; workers are started anew each time, as for each stage."""
    with TemporaryDirectory() as folder, patch.object(store, "STORE", Path(folder) / "store"):
        cases = {name: partial(_run, Path(folder), n) for name, n in (("ours", 2), ("limit", 1))}
        times = medians(cases, rounds, warm_up=1)
    each = {"ours": times["ours"] / TRIALS, "limit": times["limit"] / TRIALS / 2}
    yield entry(f"a trial of {STEPS * ROUNDS} steps, two workers", 1, each)


def _run(folder: Path, workers: int) -> None:
    """Run the trials; none is kept from the time before."""
    trials = [Trial("bench", str(workers), number, _train, {"number": number}) for number in range(TRIALS)]
    with patch.dict(os.environ, {"PHASEGATE_WORKERS": str(workers), "PHASEGATE_PROGRESS": "0"}):
        shutil.rmtree(store.STORE, ignore_errors=True)
        run_trials(trials, folder / "bench")


def _train(folder: Path, *, number: int) -> None:
    case = training_case(2)
    for _ in range(ROUNDS):
        case()
