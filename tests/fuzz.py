"""Read damaged inputs by the thousand: each must be read, or refused in one sentence.

    python -m tests.fuzz --params 2000 --checkpoints 1000 --data 500 --seed 0

Case number n of a kind is a function of the kind and n alone: `python -m tests.fuzz --data 1 --seed 123` is the 124th.
A case fails if it ends in any exception but a UserError of one printable line, in a warning or in a changed input, if
it takes more than 20 s or 1 GiB of memory, or if it accepts damage that cannot be harmless. Cases run in a child
process, so that a case which kills the process is only a failure.
"""

import argparse
import importlib
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import psutil

from phasegate.base.errors import UserError
from phasegate.base.files import sha256

KINDS = ("params", "checkpoints", "data")  # each has a module fuzz_… with functions `originals` and `case`
LONGEST = 20  # seconds
LARGEST = 1 << 30  # bytes
LONGEST_SENTENCE = 2_000  # characters


class Case(NamedTuple):
    """Hold calls that read damaged files; `harmful` if none of them may accept what it reads."""

    calls: tuple[Callable[[], object], ...]
    harmful: bool = False


class TooLong(BaseException):
    """Report a case that takes longer than `LONGEST`."""


def failures(kind: str, numbers: range) -> Iterator[str]:
    """Run cases of a kind in child processes, and yield what is wrong with each that fails."""
    waiting = list(numbers)
    while waiting:
        number = None
        folder = TemporaryDirectory()  # not the child's own: it is killed
        ours, theirs = multiprocessing.Pipe()
        words = (kind, waiting, Path(folder.name), theirs)
        child = multiprocessing.get_context("spawn").Process(target=_child, args=words, daemon=True)
        child.start()
        theirs.close()
        try:
            ours.recv()  # it is ready
            while waiting:
                number = waiting.pop(0)
                wrong = ours.recv() if ours.poll(3 * LONGEST) else "hangs beyond the reach of an alarm"
                if wrong:
                    yield f"{kind} {number}: {wrong}"
                if wrong and wrong.startswith("hangs"):
                    break
        except EOFError:
            child.join()
            if number is None or child.exitcode == 1:
                raise RuntimeError(f"no cases of {kind} can be made: the traceback is above") from None
            yield f"{kind} {number}: the process died with exit code {child.exitcode}"
        finally:
            child.kill()
            child.join()
            folder.cleanup()


def _child(kind: str, numbers: list[int], folder: Path, pipe: Connection) -> None:
    """Run these cases in an empty folder, and send what is wrong with each, or None."""
    signal.signal(signal.SIGALRM, _too_long)
    originals, scratch = folder / "originals", folder / "scratch"
    originals.mkdir()
    cases = importlib.import_module(f"tests.fuzz_{kind}")
    state = cases.originals(originals)
    pipe.send("ready")
    for number in numbers:
        scratch.mkdir()
        case = cases.case(state, random.Random(f"{kind} {number}"), scratch)
        pipe.send(_verdict(case, scratch))
        shutil.rmtree(scratch)


def _verdict(case: Case, folder: Path) -> str | None:
    """Return what is wrong with a case, if anything."""
    before = _content(folder)
    wrong = next((found for call in case.calls if (found := _attempt(call, case.harmful))), None)
    return wrong or (None if _content(folder) == before else "changed its input")


def _attempt(call: Callable[[], object], harmful: bool) -> str | None:
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    limit = (psutil.Process().memory_info().vms + LARGEST, unlimited[1]) if sys.platform == "linux" else unlimited
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        signal.alarm(LONGEST)
        resource.setrlimit(resource.RLIMIT_AS, limit)  # elsewhere it can't be lowered
        try:
            call()
            wrong = "accepts damage" if harmful else None
        except UserError as error:
            wrong = _wrong_sentence(error)
        except BaseException as error:
            wrong = f"{type(error).__name__}{_where(error)}: {str(error)[:200]!r}"
        finally:
            signal.alarm(0)
            resource.setrlimit(resource.RLIMIT_AS, unlimited)
    return wrong or (f"warns: {str(warned[0].message)[:200]!r}" if warned else None)


def _wrong_sentence(error: UserError) -> str | None:
    """Return what is wrong with the sentence, or with its cause."""
    sentence, cause = str(error), error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"takes more than {LARGEST:,} bytes{_where(cause)}, and says {sentence[:200]!r}"
        cause = cause.__cause__ or cause.__context__
    if not sentence.isprintable() or not sentence:
        return f"says what is not one printable line{_where(error)}: {sentence[:300]!r}"
    if len(sentence) > LONGEST_SENTENCE:
        return f"says {len(sentence):,} characters{_where(error)}: {sentence[:200]!r}"
    return None


def _where(error: BaseException) -> str:
    """Return the innermost line of the library that an exception passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/phasegate/" in frame.filename]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""


def _too_long(*_: object) -> None:
    raise TooLong(f"took longer than {LONGEST} s")


def _content(folder: Path) -> dict[str, Any]:
    """Return the content of a folder: hashes of files, or the sizes of large ones."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        small = path.is_file() and not path.is_symlink() and status.st_size < LARGEST
        found[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_size, sha256(path) if small else None)
    return found


def main() -> None:
    """Run the cases that the command line asks for, and end with 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0, metavar="CASES")
    parser.add_argument("--seed", type=int, default=0, help="the number of the first case of each kind")
    arguments, failed = parser.parse_args(), 0
    for kind in KINDS:
        count, start, before = getattr(arguments, kind), time.monotonic(), failed
        for wrong in failures(kind, range(arguments.seed, arguments.seed + count)):
            print(wrong, flush=True)
            failed += 1
        if count:
            seconds = time.monotonic() - start
            print(f"{kind}: {count:,} cases, {failed - before:,} failed, in {seconds:.0f} s", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
