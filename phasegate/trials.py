"""Run trials over processes, and keep each finished one by its fingerprint.

A trial is a function that fills a folder. Its fingerprint covers everything that its result depends on: the
function and its arguments, the content of its input files, the library's code and torch's version. So raising the
number of seeds or adding an arm trains only the new ones. A killed stage goes on with the trials that it had not
finished, and these with what they find in their folder, which has the fingerprint for a name.
"""

import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import joblib
import torch
from joblib.externals.loky.process_executor import BrokenProcessPool
from tqdm import tqdm

from phasegate import durations, execution, live, processes, snapshots
from phasegate.errors import Diverged, UserError
from phasegate.failure import Failure, read_failure, write_failure
from phasegate.files import sha256, write_atomic

SECONDS = "seconds.txt"
STORE = Path(".phasegate/trials")
UNFINISHED = "unfinished"  # the folder beside the store for trials that run
KEEP_DAYS = 30
SECONDS_BETWEEN_LINES = 20
OUTSIDE = tuple(
    f"phasegate.{name}"
    for names in (
        *("study sections params pretraining_params phase_params memory", "decisions statistics"),
        "trials cluster processes failure files live durations",
    )
    for name in names.split()
)
"""Modules that change no trial: parameters reach it as values, which are among its arguments; where it runs and how
its files travel can't matter; and it is judged later."""

T = TypeVar("T")
Result = tuple[str, dict[str, bytes]]
"""A trial's name, and the content of the files that it wrote, by path."""


@dataclass(frozen=True)
class Trial:
    """One call of `run(folder, **arguments)`, and all files that it reads."""

    name: str  # the folder that it fills below the stage's output, as "split/seed-3"
    run: Callable[..., None]
    arguments: dict[str, Any]  # values whose repr is their content: numbers, strings, paths, frozen dataclasses
    inputs: tuple[Path, ...] = ()  # files whose content decides the result
    reads: tuple[Path, ...] = ()  # files that it reads besides, such as a description of the inputs


def run_trials(trials: list[Trial], output: Path, label: str) -> None:
    """Run all trials that are not kept already, then put every trial's folder below `output`.

    A trial whose numbers stop being finite fails, and so do those that would have gone on from it: their folders hold
    a `failure.Failure`. The others go on.

    Raises:
        UserError: if an input file is missing, a trial meets something that its user can mend, a worker is killed, or
            every trial fails.
    """
    failures = {trial.name: failure for trial in trials if (failure := _cannot_begin(trial, label))}
    begin = [trial for trial in trials if trial.name not in failures]
    kept = _folders(begin)
    for folder in filter(Path.exists, kept.values()):
        os.utime(folder)
    _forget_old()
    missing = [trial for trial in begin if not kept[trial.name].exists()]
    try:
        with live.stage(label, len(missing)) if missing and execution.progress() else nullcontext():
            for name, files in _watch(_results(missing, kept, label), len(missing), label):
                _keep(kept[name], files)
    except BrokenProcessPool:
        raise UserError(
            f"a worker of {label} was killed, perhaps since memory ran out: `dvc repro` goes on where it was, and "
            "PHASEGATE_WORKERS=1 needs the least memory"
        ) from None
    output.mkdir(parents=True, exist_ok=True)  # there may be no trials
    for trial in trials:
        shutil.rmtree(output / trial.name, ignore_errors=True)  # what an earlier run left there, finished or failed
        if trial.name in failures:
            write_failure(output / trial.name, failures[trial.name])
            continue
        _copy(kept[trial.name], output / trial.name)
        if failure := read_failure(output / trial.name):
            failures[trial.name] = failure
    durations.record(STORE.parent, label, sum(seconds(output / trial.name) for trial in begin))
    _report(list(failures.values()), len(trials), label)


def _cannot_begin(trial: Trial, label: str) -> Failure | None:
    """The failure of a trial that has to go on from one that failed."""
    for folder in {path.parent: None for path in trial.inputs}:
        if failure := read_failure(folder):
            arm, seed = _arm_and_seed(trial.name)
            return Failure(label, arm, seed, 0, f"its start {folder} failed: {failure.reason}")
    return None


def _report(failures: list[Failure], total: int, label: str) -> None:
    """Say how many trials failed, and stop if none is left."""
    if not failures:
        return
    if len(failures) == total:
        raise UserError(f"every trial of {label} failed, as {failures[0]}; a lower learning rate may help")
    print(f"{label}: {len(failures)} of {total} trials failed, as {failures[0]}", file=sys.stderr, flush=True)


def _arm_and_seed(name: str) -> tuple[str, int]:
    """A trial's name, as "split/seed-3", taken apart; some kinds of trial have no arm."""
    arm, _, seed = name.rpartition("/")
    return arm, int(seed.removeprefix("seed-"))


def seconds(folder: Path) -> float:
    """How long the trial that filled a folder took."""
    return float((folder / SECONDS).read_text())


def _results(trials: list[Trial], kept: dict[str, Path], label: str) -> Iterator[Result]:
    """What each trial wrote, in the order in which they end."""
    if execution.backend() == "ray":
        from phasegate import cluster

        return cluster.results([(partial(_run, trial, label), (*trial.inputs, *trial.reads)) for trial in trials])
    warnings.filterwarnings("ignore", r"\d+ tasks (have been|which were) ")  # joblib's, when a run is stopped
    with processes.interrupts_held():  # so that only this process hears of Ctrl-C, not its workers
        parallel = joblib.Parallel(
            n_jobs=execution.workers(),
            return_as="generator_unordered",
            backend="loky",
            initializer=processes.work_for,  # before a worker imports torch, which takes seconds
            initargs=(os.getpid(),),
        )
        results: Iterator[Result] = parallel(
            joblib.delayed(_run_here)(trial, label, _unfinished(kept[trial.name])) for trial in trials
        )
    return results


def _run_here(trial: Trial, label: str, folder: Path) -> Result:
    """In a process of this machine: go on with what an earlier run left in `folder`."""
    live.follow(label, trial.name)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name != snapshots.SNAPSHOT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return _fill(trial, label, folder)


def _run(trial: Trial, label: str) -> Result:
    """Anywhere: run a trial from its beginning."""
    with tempfile.TemporaryDirectory() as name:
        return _fill(trial, label, Path(name))


def _fill(trial: Trial, label: str, folder: Path) -> Result:
    """Run a trial in its folder: its name and the files that it wrote, by path."""
    torch.set_num_threads(1)
    start = time.perf_counter() - snapshots.seconds(folder)
    try:
        trial.run(folder, **trial.arguments)
    except Diverged as error:
        write_failure(folder, Failure(label, *_arm_and_seed(trial.name), error.step, error.what))
    (folder / SECONDS).write_text(f"{time.perf_counter() - start:.3f}\n")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != snapshots.SNAPSHOT)
    return trial.name, {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _keep(destination: Path, files: dict[str, bytes]) -> None:
    """Write a trial's files, and give their folder its name only when it is complete."""
    temporary = destination.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for path, content in files.items():
        write_atomic(temporary / path, content)
    temporary.replace(destination)
    shutil.rmtree(_unfinished(destination), ignore_errors=True)


def _copy(kept: Path, destination: Path) -> None:
    try:
        shutil.copytree(kept, destination)
    except shutil.Error as error:
        _, path, reason = error.args[0][0]
        raise UserError(f"{path} can't be written: {reason}") from None


def _unfinished(kept: Path) -> Path:
    """Where a trial runs that is to be kept there."""
    return kept.parent.with_name(UNFINISHED) / kept.name


def _folders(trials: list[Trial]) -> dict[str, Path]:
    """Where each trial is kept, by name."""
    try:
        content = {path: sha256(path) for path in {path for trial in trials for path in trial.inputs}}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: `dvc repro` runs the stage that writes it") from None
    shared = [_code_hash(), importlib.metadata.version("torch"), _device()]
    return {trial.name: STORE / _fingerprint(trial, content, shared) for trial in trials}


def _fingerprint(trial: Trial, content: dict[Path, str], shared: list[str]) -> str:
    parts = [
        f"{trial.run.__module__}.{trial.run.__qualname__}",
        repr(sorted(trial.arguments.items())),
        *(content[path] for path in trial.inputs),
        *shared,
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _device() -> str:
    """The kind of device that trials will train on."""
    if execution.backend() == "ray":
        from phasegate import cluster

        return cluster.device()
    return execution.device().type


def _code_hash() -> str:
    """Hash of every module of the library that the running stage has imported, but for those in `OUTSIDE`."""
    library = {name: module for name, module in sys.modules.items() if name.startswith("phasegate.")}
    modules = sorted((name, module) for name, module in library.items() if name not in OUTSIDE)
    paths = [Path(module.__file__) for _, module in modules if module.__file__]
    return hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()


def _forget_old() -> None:
    """Drop trials, kept or unfinished, that nothing has used for a month, and what a killed run left half-written."""
    for folder in STORE.glob("*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (*STORE.glob("*"), *STORE.with_name(UNFINISHED).glob("*")):
        if time.time() - folder.stat().st_mtime > KEEP_DAYS * 86_400:
            shutil.rmtree(folder, ignore_errors=True)


def _watch(jobs: Iterator[T], total: int, label: str) -> Iterator[T]:
    """Pass results on, showing trials done and time left: a bar, or lines where there is no terminal."""
    if not execution.progress():
        yield from jobs
        return
    bar = sys.stderr.isatty()
    shown = tqdm(jobs, desc=label, total=total, unit="trial", smoothing=0.1, disable=not total) if bar else jobs
    start = said = time.monotonic()
    for done, result in enumerate(shown, start=1):
        live.tell(label, total, done)
        now = time.monotonic()
        if not bar and (now - said > SECONDS_BETWEEN_LINES or done == total):
            left = (now - start) / done * (total - done)
            print(f"{label}: {done} of {total} trials, about {left:.0f} s left", file=sys.stderr, flush=True)
            said = now
        yield result
