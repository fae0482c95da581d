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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import joblib
import torch
from tqdm import tqdm

from phasegate import execution
from phasegate.errors import UserError
from phasegate.files import sha256

SECONDS = "seconds.txt"
STORE = Path(".phasegate/trials")
KEEP_DAYS = 30
SECONDS_BETWEEN_LINES = 20
OUTSIDE = ("phasegate.params", "phasegate.decisions", "phasegate.statistics")
"""Modules that no trial runs: parameters reach it as values, which are among its arguments, and it is judged later."""


@dataclass(frozen=True)
class Trial:
    """One call of `run(folder, **arguments)`, and the input files whose content it depends on."""

    name: str  # the folder that it fills below the stage's output, as "split/seed-3"
    run: Callable[..., None]
    arguments: dict[str, Any]  # values whose repr is their content: numbers, strings, paths, frozen dataclasses
    inputs: tuple[Path, ...] = field(default=())


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
    parallel = joblib.Parallel(n_jobs=execution.workers(), return_as="generator_unordered", backend="loky")
    jobs = parallel(joblib.delayed(_run)(trial, kept[trial.name], label) for trial in missing)
    for _ in _watch(jobs, len(missing), label):
        pass
    for trial in trials:
        shutil.copytree(kept[trial.name], output / trial.name, dirs_exist_ok=True)


def seconds(folder: Path) -> float:
    """How long the trial that filled a folder took."""
    return float((folder / SECONDS).read_text())


def _run(trial: Trial, destination: Path, label: str) -> None:
    """In a worker: fill a temporary folder, and give it its name only when it is complete."""
    torch.set_num_threads(1)
    temporary = destination.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    start = time.perf_counter()
    try:
        trial.run(temporary, **trial.arguments)
    except FloatingPointError as error:
        raise UserError(f"trial {trial.name} of {label}: {error}; a lower learning rate may help") from None
    (temporary / SECONDS).write_text(f"{time.perf_counter() - start:.3f}\n")
    temporary.replace(destination)


def _folders(trials: list[Trial]) -> dict[str, Path]:
    """Where each trial is kept, by name."""
    try:
        content = {path: sha256(path) for path in {path for trial in trials for path in trial.inputs}}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: `dvc repro` runs the stage that writes it") from None
    code = _code_hash()
    return {trial.name: STORE / _fingerprint(trial, content, code) for trial in trials}


def _fingerprint(trial: Trial, content: dict[Path, str], code: str) -> str:
    parts = [
        f"{trial.run.__module__}.{trial.run.__qualname__}",
        repr(sorted(trial.arguments.items())),
        *(content[path] for path in trial.inputs),
        code,
        importlib.metadata.version("torch"),
        execution.device().type,
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


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


def _watch(jobs: Iterator[None], total: int, label: str) -> Iterator[None]:
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
