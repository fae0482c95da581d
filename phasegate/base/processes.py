"""End processes together: one run at a time in a folder, and none that outlives the run that it belongs to."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any, NoReturn, TypeVar

from filelock import FileLock, Timeout

from phasegate.base import used

LOCK = Path(".phasegate/lock")
SECONDS_TO_NOTICE = 0.2
T = TypeVar("T")


def in_workers(act: Callable[..., T], calls: list[tuple[Any, ...]], count: int, start_method: str) -> Generator[T]:
    """Make calls of `act` in `count` processes, and yield what they return in the order in which they end.

    A process that is forked is a copy of this one: it runs the code that is loaded here, and begins at once.

    Raises:
        BrokenProcessPool: if a process is killed.
    """
    context = multiprocessing.get_context(start_method)
    pool = ProcessPoolExecutor(count, context, _start_worker, (os.getpid(), used.begun()))
    try:
        with _deaf_to_ctrl_c():  # or a worker that begins would end with a traceback
            ends = as_completed([pool.submit(act, *call) for call in calls])
        for done in ends:
            yield done.result()
    except BaseException:  # also of whoever uses the results
        _kill_workers()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(parent: int, note_used: bool) -> None:
    """Make this process ignore Ctrl-C, which `parent` handles, end with `parent`, and perhaps note what it uses."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with(parent)
    if note_used:
        used.begin()


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Hold back SIGINT until the end; processes and threads that begin meanwhile never get one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def on_stop(act: Callable[[int, FrameType | None], object]) -> None:
    """Install a handler for SIGINT and SIGTERM, unless they are ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, act)


def say_stopped(*_: object) -> NoReturn:
    """Say that this run was stopped and how to resume it, then end this process and its workers."""
    print(f"{Path(sys.argv[0]).stem}: stopped; `dvc repro` resumes it", file=sys.stderr, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a thread that waits for the workers would complain
    _kill_workers()
    os._exit(130)


def _kill_workers() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()


def end_with(parent: int) -> None:
    """End this process as soon as `parent`, which started it, is gone, even if it was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_TO_NOTICE)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other stage runs in this folder, and keep others waiting."""
    LOCK.parent.mkdir(exist_ok=True)
    lock = FileLock(LOCK)
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        print(f"{Path.cwd()}: another run is at work here; waiting until it ends", file=sys.stderr, flush=True)
        held = lock.acquire()
    with held:
        yield
