"""Note every file that this process uses, and refuse its results if one of them changes meanwhile.

Python tells an audit hook which files it opens: modules, parameters, plugins, inputs. A file's state has its inode and
the time of its last change (ctime), which no program sets back. So a file whose state at the end is the state at its
first use held the same bytes all the time, whoever read it: this process, or the workers that it started.
"""

import os
import stat
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import source_from_cache
from pathlib import Path

from phasegate.base.errors import UserError
from phasegate.base.paths import TIMINGS

State = tuple[int, ...]
LIBRARY = str(Path(__file__).parents[2])  # holds phasegate/ and stages/
_roots: list[str] = []  # files below them are noted; none before `begin`
_states: dict[str, State] = {}  # of every file, when it was first used
_contents: dict[str, bytes] = {}  # of files that this process alone reads, and once: only their content counts
_code: set[str] = set()  # those of the files that are code
_trial: set[str] = set()  # the files of the trial that runs in this process


def begin() -> None:
    """Note from now on what is opened below this folder and the library, hidden folders and the environment apart."""
    _listen()
    _roots[:] = dict.fromkeys((str(Path.cwd()), LIBRARY))
    for module in [*sys.modules.values()]:
        if file := getattr(module, "__dict__", {}).get("__file__"):
            note(file)


def begun() -> bool:
    """Return whether this process notes what it uses."""
    return bool(_roots)


def end() -> None:
    """Forget all that was noted, and note nothing more."""
    for noted in (_roots, _states, _contents, _code, _trial):
        noted.clear()


def include(path: Path) -> None:
    """Note also what is opened at or below this path, if anything is noted: it may lie anywhere."""
    _roots.extend([os.path.abspath(path)] if _roots else [])  # noqa: PTH100


def note(path: str | Path) -> str | None:
    """Note a file as used, for bytecode its source, and return its name; None for a file that does not count.

    Only needed where a file is read in another way than by Python's `open`.
    """
    name = os.path.abspath(path)  # noqa: PTH100
    with suppress(ValueError):
        name = source_from_cache(name) if name.endswith(".pyc") else name
    below = [name[len(root) :] for root in _roots if name == root or name.startswith(f"{root}/")]
    if not below or below[0].startswith("/.") or name.startswith(f"{sys.prefix}/"):
        return None
    apart = "/__pycache__/" in name or below[0] == f"/{TIMINGS}"  # compiled kernels, and times: no result needs them
    if apart or not (state := _state(name)):
        return None
    _states.setdefault(name, state)
    _trial.add(name)
    if name.endswith(".py"):
        _code.add(name)
    return name


def note_content(path: Path, content: bytes) -> None:
    """Note what this process, and no worker, read from a file: DVC rewrites params.yaml when it queues experiments."""
    if name := note(path):
        _contents.setdefault(name, content)


def states(data: Iterable[Path]) -> dict[str, State]:
    """Return the noted states of all code and of these data."""
    names = [*_code, *(os.path.abspath(path) for path in data)]  # noqa: PTH100
    return {name: _states[name] for name in names if name in _states}


def expect(found: Mapping[str, State]) -> None:
    """Begin a trial in this process: all that it uses must be in the state that the stage found."""
    _states.update(found)
    _trial.clear()
    _trial.update(found)


def strangers(found: Mapping[str, State]) -> list[Path]:
    """Return the files that the trial has used and the stage has not found."""
    return sorted(map(Path, _trial.difference(found)))


def check(names: Iterable[str] | None = None) -> None:
    """Raise `UserError` if a file has changed since it was first used: one of `names`, or any."""
    for name in [*_states] if names is None else names:
        if _state(name) != _states[name] and not (_state(name) and _contents.get(name) == Path(name).read_bytes()):
            said = "changed after it was read, so this result is not recorded: `dvc repro` makes it anew"
            raise UserError(f"{os.path.relpath(name)} {said}")


def check_trial() -> None:
    """Raise `UserError` if a file of the trial that runs in this process has changed since the stage read it."""
    check([*_trial])


@cache
def _listen() -> None:
    sys.addaudithook(_hear)  # for good: Python removes none


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    """Note what is opened to be read. OSError for bytecode as old as its source makes Python compile the source.

    Python compares only sizes and whole seconds: of two edits within a second, it may run the first for the second.
    """
    if event != "open" or not _roots:
        return
    path, _, flags = arguments
    if isinstance(path, str | bytes | os.PathLike) and not int(str(flags)) & (os.O_WRONLY | os.O_RDWR):
        name = note(opened := os.fsdecode(path))
        imports = opened.endswith(".pyc") and "importlib" in sys._getframe(1).f_code.co_filename
        made = _state(opened) if imports else None
        if name and made and made[2] // 10**9 <= _states[name][2] // 10**9:
            raise OSError(f"{opened} may be older than {name}")


def _state(name: str) -> State | None:
    """Return what changes with a file's content, or None if there is no such regular file."""
    try:
        found = os.stat(name)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    regular = stat.S_ISREG(found.st_mode)
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns) if regular else None
