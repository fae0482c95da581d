"""What becomes of processes: one run at a time in a folder, and none that outlives the run that it belongs to."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
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


def leave(code: int) -> NoReturn:
    """End at once, and silently, the processes that this one started, and then this one."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a thread that waits for them would complain
    for worker in filter(None, (child.pid for child in multiprocessing.active_children())):
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    os._exit(code)


def terminate_as_interrupt() -> None:
    """Take SIGTERM, with which machines stop what runs on them, for Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


@cache
def end_with(parent: int) -> None:
    """End this process, if `parent` started it, as soon as that one is gone, be it by SIGKILL."""
    if parent == os.getpid():
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_TO_NOTICE)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
