"""Run trials in processes, and keep every finished one.

After an added seed or arm, only the new trials are trained. A killed stage resumes with its unfinished trials, and each
of these from the last snapshot in its folder.
"""

import os
import shutil
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

import phasegate
from phasegate.base import processes, processor, settings, timings, used
from phasegate.base.errors import Diverged, UserError
from phasegate.records.trial_folder import MACHINE, SECONDS, Failure, read_failure, write_failure
from phasegate.training import killed_trials
from phasegate.training.device import device, start_method, workers
from phasegate.trials import store
from phasegate.trials.code import OUTSIDE, package_of
from phasegate.trials.trial import Trial

SECONDS_BETWEEN_LINES = 20
T = TypeVar("T")
Result = tuple[str, dict[str, bytes]]
"""A trial's name, and the content of the files that it wrote, by path."""


def run_trials(trials: list[Trial], output: Path, all_may_fail: bool = False) -> None:
    """Run all trials that are not kept yet, then copy the folder of every trial below `output`.

    Trials that read files of others, below `output`, run after those. What trials took, also those kept from earlier
    runs, goes to `reports/timings.csv`.

    A trial whose numbers stop being finite fails, and so does every trial that needs it: their folders hold a
    `trial_folder.Failure`. The other trials continue.

    Raises:
        UserError: if an input file is missing, a trial raises it, a worker is killed, every trial fails and
            not `all_may_fail`, or code or an input of a trial changes before the trial ends: it is not kept.
    """
    label, failures, kept = output.name, dict[str, Failure](), dict[str, Path]()
    output.mkdir(parents=True, exist_ok=True)  # there may be no trials
    left = {output / trial.name: trial for trial in trials}
    while left:
        part = {folder: trial for folder, trial in left.items() if not {path.parent for path in trial.inputs} & {*left}}
        _run_part([*part.values()], output, failures, kept)
        left = {folder: trial for folder, trial in left.items() if folder not in part}
    store.forget_old(in_use=kept.values())
    timings.record(label, {name: store.taken(folder) for name, folder in kept.items()})
    if failures:
        n_failed, first = len(failures), next(iter(failures.values()))
        if n_failed == len(trials) and not all_may_fail:
            raise UserError(f"every trial of {label} failed, the first: {first}; a lower learning rate may help")
        print(f"{label}: {n_failed} of {len(trials)} trials failed, the first: {first}", file=sys.stderr, flush=True)


def _run_part(trials: list[Trial], output: Path, failures: dict[str, Failure], kept: dict[str, Path]) -> None:
    """Run trials that need none of each other; add to `failures` those that failed, to `kept` where the others are."""
    label = output.name
    failures |= {trial.name: failure for trial in trials if (failure := _find_failed_need(trial))}
    startable = [trial for trial in trials if trial.name not in failures]
    kept |= store.kept_folders(startable, _device())
    missing = {trial.name: trial for trial in startable if not _is_kept(trial, kept[trial.name], label)}
    try:
        with closing(_results([*missing.values()], kept)) as results:
            for name, files in _with_progress(results, len(missing), label):
                used.check(_found(missing[name]))
                store.keep(kept[name], files)
    except processes.WorkerKilled:
        hint = "`dvc repro` resumes, and PHASEGATE_WORKERS=1 needs the least memory"
        raise UserError(f"a worker of {label} was killed, perhaps because memory ran out: {hint}") from None
    for trial in trials:
        folder = output / trial.name
        if trial.name in failures:
            shutil.rmtree(folder, ignore_errors=True)
            write_failure(folder, failures[trial.name])
        else:
            store.copy_kept(kept[trial.name], folder)
        if failure := read_failure(folder):
            failures[trial.name] = failure


def _is_kept(trial: Trial, kept: Path, label: str) -> bool:
    """Return whether a trial is kept; drop it if it is damaged."""
    if kept.exists() and (damaged := store.find_damage(kept)):
        print(f"{label}: {trial.name} runs again, since {kept / damaged} is not what was kept", file=sys.stderr)
        shutil.rmtree(kept)
    return kept.exists()


def _found(trial: Trial) -> dict[str, used.State]:
    """Return the states in which this process found the code and the files that a trial reads."""
    for path in trial.reads:
        used.note(path)
    return used.states((*trial.inputs, *trial.reads))


def _find_failed_need(trial: Trial) -> Failure | None:
    """Return the failure of a trial that needs the folder of a failed one."""
    for folder in {path.parent: None for path in trial.inputs}:
        if failure := read_failure(folder):
            return Failure(trial.phase, trial.arm, trial.seed, 0, f"{folder}, which it needs, failed: {failure.reason}")
    return None


def _device() -> str:
    """Name the kind of device that trials will train on."""
    if settings.backend() == "ray":
        from phasegate.trials import cluster

        return cluster.device()
    return device().type


def _results(trials: list[Trial], kept: dict[str, Path]) -> Generator[Result]:
    """Yield the result of each trial, in the order in which they end."""
    if settings.backend() == "ray":
        from phasegate.trials import cluster

        here = Path("trial")  # in a folder of the call's own
        return cluster.results([(partial(_run, trial, here, {}), (*trial.inputs, *trial.reads)) for trial in trials])
    calls = [(trial, store.unfinished_folder(kept[trial.name]), _found(trial)) for trial in trials]
    if (count := workers()) == 1:
        return (_run(*call) for call in calls)
    return processes.in_workers(_run, calls, count, start_method())


def _run(trial: Trial, folder: Path, found: dict[str, used.State]) -> Result:
    """Run a trial, if possible from the snapshot of an earlier run in `folder`, and return the files that it wrote.

    `UserError` if it uses files that are not as the stage `found` them, or others that no fingerprint would cover.
    """
    if phasegate.UNPINNED:
        raise UserError(phasegate.UNPINNED)
    torch.set_num_threads(1)
    used.expect(found)
    used.check_trial()
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name != killed_trials.SNAPSHOT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    start = time.perf_counter() - killed_trials.seconds(folder)
    try:
        trial.run(folder, **trial.arguments)
    except Diverged as error:
        write_failure(folder, Failure(trial.phase, trial.arm, trial.seed, error.step, error.what))
    except SystemExit as error:  # it would end this process as if all were done
        raise RuntimeError(f"{trial.name} of {trial.phase} called sys.exit({error.code!r})") from error
    if strangers := [path for path in used.strangers(found) if package_of(path) not in OUTSIDE]:
        named = os.path.relpath(strangers[0])
        raise UserError(f"{trial.name} of {trial.phase} used {named}, which is none of its inputs")
    (folder / SECONDS).write_text(f"{time.perf_counter() - start:.3f}\n", encoding="utf-8")
    (folder / MACHINE).write_text(f"{processor.name()}\n", encoding="utf-8")
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != killed_trials.SNAPSHOT)
    return trial.name, {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _with_progress(results: Iterator[T], total: int, label: str) -> Iterator[T]:
    """Pass results on and show the trials done and the time left: as a bar, or as lines without a terminal."""
    bar, shown = sys.stderr.isatty(), settings.progress()
    start = said = time.monotonic()
    bars = tqdm(results, desc=label, total=total, unit="trial", smoothing=0.1, disable=not (bar and shown and total))
    for done, result in enumerate(bars, start=1):
        now = time.monotonic()
        if shown and not bar and (now - said > SECONDS_BETWEEN_LINES or done == total):
            left = (now - start) / done * (total - done)
            print(f"{label}: {done} of {total} trials, about {left:.0f} s left", file=sys.stderr, flush=True)
            said = now
        yield result
