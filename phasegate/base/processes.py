"""End processes together: one run at a time in a folder, and none that outlives the run that it belongs to."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any, NoReturn, TypeVar

from filelock import FileLock, Timeout

from phasegate.base import used
from phasegate.base.errors import UserError

LOCK = Path(".phasegate/lock")
SECONDS_TO_NOTICE = 0.2
T = TypeVar("T")


class WorkerKilled(Exception):
    """Report that a worker process ended before its call did."""


def in_workers(act: Callable[..., T], calls: list[tuple[Any, ...]], count: int, start_method: str) -> Generator[T]:
    """Make calls of `act` in `count` processes, and yield what they return in the order in which they end.

    A process that is forked is a copy of this one: it runs the code that is loaded here, and begins at once. Each has
    a pipe of its own, so that one which is killed in the middle of its answer is noticed and holds up nobody.

    Raises:
        WorkerKilled: if a process ends before its call does.
    """
    context: Any = multiprocessing.get_context(start_method)
    left, workers = iter(calls), dict[Any, BaseProcess]()
    try:
        with _signals_later():
            for _ in range(min(count, len(calls))):
                here, there = context.Pipe()
                worker = context.Process(target=_serve, args=(there, act, os.getpid(), used.begun()), daemon=True)
                worker.start()
                there.close()
                workers[here] = worker
        idle, busy, answers = list[Any](workers), list[Any](), list[Any]()
        while idle:
            for here, call in zip(idle, left, strict=False):
                with suppress(OSError):  # it is gone, and will have no answer
                    here.send(call)
                busy.append(here)
            for error, result in answers:
                if error:
                    raise error
                yield result
            idle = [*wait(busy)] if busy else []
            try:
                answers = [here.recv() for here in idle]
            except (EOFError, OSError):
                raise WorkerKilled from None
            busy = [here for here in busy if here not in idle]
    finally:
        for worker in workers.values():
            worker.kill()
            worker.join()


def _serve(calls: Connection, act: Callable[..., object], parent: int, note_used: bool) -> None:
    """Answer calls with an error, if there is one, and a result. Ignore Ctrl-C, and end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with(parent)
    if note_used:
        used.begin()
    with suppress(EOFError, OSError):  # the parent is gone
        while True:
            call = calls.recv()
            try:
                answer: tuple[Any, Any] = None, act(*call)
            except (UserError, OSError) as error:
                answer = error, None
            except BaseException:  # not every error survives a pipe, but its words do
                answer = RuntimeError(f"in a worker:\n{traceback.format_exc()}"), None
            calls.send(answer)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Act on SIGINT and SIGTERM at the end: what Python does at a fork would swallow what their handlers raise."""
    noted: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for good in processes that begin meanwhile
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    on_stop(lambda number, _: noted.append(number))
    try:
        yield
    finally:
        for known, act in before.items():
            signal.signal(known, act)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number in noted:
        signal.raise_signal(number)


def on_stop(act: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """Install a handler for SIGINT and SIGTERM, unless they are ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, act)


def say_stopped(*_: object) -> NoReturn:
    """Say that this run was stopped and how to resume it, then end this process and its workers."""
    on_stop(signal.SIG_IGN)  # once is enough
    print(f"{Path(sys.argv[0]).stem}: stopped; `dvc repro` resumes it", file=sys.stderr, flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()
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
        held = lock.acquire(blocking=False)
    except Timeout:
        print(f"{Path.cwd()}: another run is at work here; waiting until it ends", file=sys.stderr, flush=True)
        held = lock.acquire()
    with held:
        yield
