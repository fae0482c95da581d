"""End processes together: one run at a time in a folder, and none that outlives the run that it belongs to."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import NoReturn

from filelock import FileLock, Timeout

from phasegate.base import used

LOCK = Path(".phasegate/lock")
SECONDS_TO_NOTICE = 0.2


def start_worker(parent: int, note_used: bool) -> None:
    """Make this process ignore Ctrl-C, which `parent` handles, end with `parent`, and perhaps note what it uses."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)
    if note_used:
        used.begin()


@contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
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
    for worker in filter(None, (child.pid for child in multiprocessing.active_children())):
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    os._exit(130)


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
        lock.acquire(blocking=False)
    except Timeout:
        print(f"{Path.cwd()}: another run is at work here; waiting until it ends", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
