"""Note every file that this process uses, and refuse its results if one of them changes meanwhile.

Python tells an audit hook which files it opens: modules, parameters, plugins, inputs. A file's state has its inode and
the time of its last change (ctime), which no program sets back. So a file whose state at the end is the state at its
first use held the same bytes all the time, whoever read it: this process, or the workers that it started.
"""

import os
import stat
import sys
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import source_from_cache
from pathlib import Path

from phasegate.base.errors import UserError

State = tuple[int, ...]
LIBRARY = str(Path(__file__).parents[2])  # holds phasegate/ and stages/
_roots: list[str] = []  # files below them are noted; none before `begin`
_states: dict[str, State] = {}  # of every file, when it was first used
_trial: set[str] = set()  # the files of the trial that runs in this process


def begin() -> None:
    """Note from now on what is opened below this folder and the library, hidden folders and the environment apart."""
    _listen()
    _roots[:] = dict.fromkeys((str(Path.cwd()), LIBRARY))
    for module in [*sys.modules.values()]:
        if file := getattr(module, "__dict__", {}).get("__file__"):
            _note_own(file)


def end() -> None:
    """Forget all that was noted, and note nothing more."""
    for noted in (_roots, _states, _trial):
        noted.clear()


def begun() -> bool:
    """Return whether this process notes what it uses."""
    return bool(_roots)


def note(path: str | Path) -> None:
    """Note a file that is read in another way than by Python's `open`, or lies outside this folder."""
    name = os.path.abspath(path)  # noqa: PTH100 (of a path that may be a link)
    if _roots and (state := _state(name)):
        _states.setdefault(name, state)
        _trial.add(name)


def states(data: Iterable[Path]) -> dict[str, State]:
    """Return the noted states of all code, and of these other files."""
    wanted = {os.path.abspath(path) for path in data}  # noqa: PTH100
    return {name: state for name, state in _states.items() if name in wanted or _is_code(name)}


def expect(found: Mapping[str, State]) -> None:
    """Begin a trial in this process: all that it uses must be in the state that the stage found."""
    _states.update(found)
    _trial.clear()
    _trial.update(found)


def strangers(expected: Collection[str]) -> list[Path]:
    """Return the files that the trial used so far and that are not among those expected, relative to this folder."""
    return sorted(Path(os.path.relpath(name)) for name in _trial.difference(expected))


def check(names: Iterable[str] | None = None) -> None:
    """Raise `UserError` if a file has changed since it was first used: one of `names`, or any."""
    for name in [*_states] if names is None else names:
        if _state(name) != _states.get(name):
            raise UserError(
                f"{os.path.relpath(name)} changed after it was read, so this result is not recorded: "
                "`dvc repro` makes it anew"
            )


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
        name, opened = _note_own(os.fsdecode(path)), os.fsdecode(path)
        if flags == 0 and name and opened.endswith(".pyc"):  # by an import
            made, source = _state(opened), _states.get(name)
            if made and source and made[2] // 10**9 <= source[2] // 10**9:
                raise OSError(f"{opened} may be older than {name}")


def _note_own(path: str) -> str | None:
    """Note a file below the roots, for bytecode its source, and return its name; None for any other file."""
    name = os.path.abspath(path)  # noqa: PTH100
    with suppress(ValueError):
        name = source_from_cache(name) if name.endswith(".pyc") else name
    for root in _roots:
        if name.startswith(f"{root}/") and name[len(root) + 1] != "." and not name.startswith(f"{sys.prefix}/"):
            note(name)
            return name
    return None


def _is_code(name: str) -> bool:
    return name.endswith(".py")


def _state(name: str) -> State | None:
    """Return what changes with a file's content, or None if there is no such regular file."""
    try:
        found = os.stat(name)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    regular = stat.S_ISREG(found.st_mode)
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns) if regular else None
