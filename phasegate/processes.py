"""What becomes of processes: one run at a time in a folder, and none that outlives the run that it belongs to."""

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

LOCK = Path(".phasegate/lock")
SECONDS_TO_NOTICE = 0.2


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


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Processes that are started within this context are deaf to Ctrl-C; here it is heard a moment later."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def when_stopped(act: Callable[[int, FrameType | None], object]) -> None:
    """What to do from now on at Ctrl-C, if it reaches this process, and at SIGTERM, with which machines stop it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, act)


def say_stopped(*_: object) -> NoReturn:
    """Say that this run was stopped, and how to go on, and leave it."""
    print(f"{Path(sys.argv[0]).stem}: stopped; `dvc repro` goes on where it was", file=sys.stderr, flush=True)
    leave(130)


def leave(code: int) -> NoReturn:
    """End at once, and silently, the processes that this one started, and then this one."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a thread that waits for them would complain
    for worker in filter(None, (child.pid for child in multiprocessing.active_children())):
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    os._exit(code)


def work_for(parent: int) -> None:
    """Begin as a worker of `parent`: deaf to Ctrl-C, which that one hears, and gone as soon as that one is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)


def end_with(parent: int) -> None:
    """End this process as soon as `parent`, which started it, is gone, be it by SIGKILL."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_TO_NOTICE)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
