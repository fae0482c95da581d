"""Keep finished trials in `.phasegate/trials`, each under the fingerprint of everything that decides its result.

A kept trial has a manifest: its fingerprint, and the hash of each of its files.
"""

import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from pathlib import Path, PurePath

from phasegate.base.errors import UserError
from phasegate.base.files import read_json, sha256, write_atomic
from phasegate.base.timings import Taken
from phasegate.records.trial_folder import MACHINE, SECONDS
from phasegate.trials.code import dependencies
from phasegate.trials.trial import Trial

STORE = Path(".phasegate/trials")
UNFINISHED = "unfinished"  # the folder beside the store for trials that run
KEEP_DAYS = 30
MANIFEST = "manifest.json"
NOT_COPIED = (SECONDS, MACHINE, MANIFEST)


def kept_folders(trials: list[Trial], device: str) -> dict[str, Path]:
    """Return the folder that keeps each trial once it is finished, by name; `device` is the kind that trials train on.

    Raises `UserError` if an input file is missing.
    """
    shared = [importlib.metadata.version("torch"), device]
    try:
        data = dependencies((), {path for trial in trials for path in trial.inputs})  # trials share most of them
        return {trial.name: STORE / _fingerprint(trial, data, shared) for trial in trials}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: `dvc repro` runs the stage that writes it") from None


def find_damage(kept: Path) -> str | None:
    """Return the first file of a kept trial that is not what was kept, or None."""
    try:
        manifest = read_json(kept / MANIFEST)
        wanted = {MANIFEST: kept.name} | manifest["files"]
        files = [path for path in kept.rglob("*") if path.is_file() and path != kept / MANIFEST]
        found = {str(path.relative_to(kept)): sha256(path) for path in files} | {MANIFEST: manifest["fingerprint"]}
    except (UserError, TypeError, KeyError):
        return MANIFEST
    return min((name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)), default=None)


def unfinished_folder(kept: Path) -> Path:
    """Return the folder in which a trial runs that will be kept in `kept`."""
    return kept.parent.with_name(UNFINISHED) / kept.name


def keep(kept: Path, files: dict[str, bytes]) -> None:
    """Write a trial's files and their manifest. The folder gets its name only when it is complete."""
    temporary = kept.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    hashes = {path: sha256(content) for path, content in files.items()}
    manifest = json.dumps({"fingerprint": kept.name, "files": hashes}, indent=2) + "\n"
    for path, content in (files | {MANIFEST: manifest.encode()}).items():
        write_atomic(temporary / path, content)
    temporary.replace(kept)
    shutil.rmtree(unfinished_folder(kept), ignore_errors=True)


def copy_kept(kept: Path, destination: Path) -> None:
    """Make a folder hold a kept trial's result; raise `UserError` if a file can't be written, or is not what was kept.

    One that holds it, as when a search has trained another seed, stays as it is: the stage has read it.
    """
    if _dates(destination) == {name: date for name, date in _dates(kept).items() if name not in NOT_COPIED}:
        return
    shutil.rmtree(destination, ignore_errors=True)  # an earlier run may have left files
    try:
        shutil.copytree(kept, destination, ignore=shutil.ignore_patterns(*NOT_COPIED))
    except shutil.Error as error:
        _, path, reason = error.args[0][0]
        raise UserError(f"{path} can't be written: {reason}") from None
    if damaged := find_damage(kept):
        shutil.rmtree(destination)
        raise UserError(f"{kept / damaged} changed after it was kept: `dvc repro` trains that trial again")


def taken(kept: Path) -> Taken:
    """Return how many seconds a kept trial took, and on which machine."""
    return float((kept / SECONDS).read_text(encoding="utf-8")), (kept / MACHINE).read_text(encoding="utf-8").strip()


def forget_old(in_use: Iterable[Path]) -> None:
    """Delete kept trials that were not `in_use` for a month, and what a killed run left half-written."""
    for folder in filter(Path.exists, in_use):
        os.utime(folder)
    long_ago = time.time() - KEEP_DAYS * 86_400
    for folder in (*STORE.glob("*"), *STORE.with_name(UNFINISHED).glob("*")):
        if folder.suffix == ".tmp" or folder.stat().st_mtime < long_ago:
            shutil.rmtree(folder, ignore_errors=True)


def _dates(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and date of each file below a folder, which copies have too, by its path there."""
    found = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def _fingerprint(trial: Trial, data: dict[Path, str], shared: list[str]) -> str:
    """Hash a trial's function and arguments with their code, its input files, and what all trials share."""
    sources: set[Callable[..., object]] = {trial.run}
    arguments = _strip_paths(trial.arguments, sources)
    scripts = [Path(inspect.getfile(inspect.unwrap(source))) for source in sources]
    plugins = [path for path in trial.inputs if path.suffix == ".py"]  # which may import more than the trial does
    code, inputs = dependencies((*scripts, *plugins)), [data[path] for path in trial.inputs]
    parts = [trial.run.__qualname__, repr(arguments), *code.values(), *inputs, *shared]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _strip_paths(value: object, sources: set[Callable[..., object]]) -> object:
    """Return an argument without its paths, whose files count by content, and add its dataclasses to `sources`."""
    if isinstance(value, PurePath):
        return "path"
    if isinstance(value, dict):
        return {key: _strip_paths(value[key], sources) for key in sorted(value)}
    if isinstance(value, tuple):
        return tuple(_strip_paths(part, sources) for part in value)
    if is_dataclass(value):
        sources.add(type(value))  # a policy builds the controllers of its arm, so its code counts
        return type(value).__qualname__, _strip_paths(vars(value), sources)
    return value
