"""Run trials over processes, and keep each finished one by its fingerprint.

A trial is a function that fills a folder. Its fingerprint covers everything that its result depends on: the
function and its arguments, the content of its input files, the library's code and torch's version. So raising the
number of seeds or adding an arm trains only the new ones, and a killed stage goes on with the trials that it had not
finished.
"""

import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import joblib
import torch
from tqdm import tqdm

from phasegate import execution
from phasegate.errors import UserError
from phasegate.files import sha256, write_atomic

SECONDS = "seconds.txt"
STORE = Path(".phasegate/trials")
KEEP_DAYS = 30
SECONDS_BETWEEN_LINES = 20
OUTSIDE = tuple(f"phasegate.{name}" for name in ("params", "trials", "cluster", "files", "decisions", "statistics"))
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

    Raises:
        UserError: if an input file is missing, or a trial fails for a reason that its user can mend.
    """
    kept = _folders(trials)
    for folder in filter(Path.exists, kept.values()):
        os.utime(folder)
    _forget_old()
    missing = [trial for trial in trials if not kept[trial.name].exists()]
    for name, files in _watch(_results(missing, label), len(missing), label):
        _keep(kept[name], files)
    for trial in trials:
        shutil.copytree(kept[trial.name], output / trial.name, dirs_exist_ok=True)


def seconds(folder: Path) -> float:
    """How long the trial that filled a folder took."""
    return float((folder / SECONDS).read_text())


def _results(trials: list[Trial], label: str) -> Iterator[Result]:
    """What each trial wrote, in the order in which they end."""
    if execution.backend() == "ray":
        from phasegate import cluster

        return cluster.results([(partial(_run, trial, label), (*trial.inputs, *trial.reads)) for trial in trials])
    parallel = joblib.Parallel(n_jobs=execution.workers(), return_as="generator_unordered", backend="loky")
    results: Iterator[Result] = parallel(joblib.delayed(_run)(trial, label) for trial in trials)
    return results


def _run(trial: Trial, label: str) -> Result:
    """In a worker: the trial's name and the files that it wrote, by path."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, start = Path(name), time.perf_counter()
        try:
            trial.run(folder, **trial.arguments)
        except FloatingPointError as error:
            raise UserError(f"trial {trial.name} of {label}: {error}; a lower learning rate may help") from None
        (folder / SECONDS).write_text(f"{time.perf_counter() - start:.3f}\n")
        return trial.name, {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _keep(destination: Path, files: dict[str, bytes]) -> None:
    """Write a trial's files, and give their folder its name only when it is complete."""
    temporary = destination.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for path, content in files.items():
        write_atomic(temporary / path, content)
    temporary.replace(destination)


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
    """Drop kept trials that nothing has used for a month."""
    for folder in STORE.glob("*"):
        if time.time() - folder.stat().st_mtime > KEEP_DAYS * 86_400:
            shutil.rmtree(folder, ignore_errors=True)


def _watch(jobs: Iterator[T], total: int, label: str) -> Iterator[T]:
    """Pass results on, showing trials done and time left: a bar, or lines where there is no terminal."""
    if not execution.progress():
        yield from jobs
    elif sys.stderr.isatty():
        yield from tqdm(jobs, desc=label, total=total, unit="trial", smoothing=0.1, disable=not total)
    else:
        start = shown = time.monotonic()
        for done, result in enumerate(jobs, start=1):
            now = time.monotonic()
            if now - shown > SECONDS_BETWEEN_LINES or done == total:
                left = (now - start) / done * (total - done)
                print(f"{label}: {done} of {total} trials, about {left:.0f} s left", file=sys.stderr, flush=True)
                shown = now
            yield result
