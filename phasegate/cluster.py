"""Trials past one machine: a joblib backend whose calls are Ray tasks, and files that travel with them.

Ray's own joblib backend gives calls to actors in turn. When a machine is lost, its actors wait for processors that
others hold, and the calls that were theirs never end. A task goes to whichever processor is free, and Ray starts it
again elsewhere when its machine is lost.

No disk is shared: the library's code and a trial's input files go out, and the files that it wrote come back.
"""

import contextlib
import importlib.metadata
import logging
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import joblib
import ray
import ray.exceptions
from joblib.parallel import ParallelBackendBase

import phasegate
from phasegate import execution
from phasegate.errors import UserError
from phasegate.files import write_atomic

RETRIES = 5  # of a call whose machine was lost
SECONDS_TO_ANSWER = 10
T = TypeVar("T")


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names or that runs on this machine, or else start one here.

    Raises:
        UserError: if no cluster answers, or it does not let us in.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray announces that it will become so
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        if port := re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address):
            socket.create_connection((port[1], int(port[2])), SECONDS_TO_ANSWER).close()  # Ray would try for minutes
    except OSError:
        raise UserError(f"no Ray cluster answers at RAY_ADDRESS={address}") from None
    code = {"py_modules": [str(Path(phasegate.__file__).parent)]}
    try:
        ray.init(runtime_env=code, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError):
        advice = "if it asks for a token, set RAY_AUTH_MODE=token (docs/cluster.md)"
        raise UserError(f"the Ray cluster at RAY_ADDRESS={address} can't be joined: {advice}") from None


def device() -> str:
    """The kind of device that calls find: cuda if the cluster has GPUs and nobody said otherwise, or else cpu."""
    connect()
    wanted, found = execution.wanted_device(), bool(ray.cluster_resources().get("GPU"))
    if wanted == "cuda" and not found:
        raise UserError("PHASEGATE_DEVICE is cuda, but the Ray cluster has no GPU: use auto or cpu")
    return "cuda" if found and wanted != "cpu" else "cpu"


def results(calls: Iterable[tuple[Callable[[], T], tuple[Path, ...]]]) -> Iterator[T]:
    """What each call returns, in the order in which they end; each finds the files that it needs.

    Raises:
        UserError: if a call raises it, is lost with its machine again and again, or meets another version of torch.
    """
    put = cache(lambda path: ray.put(path.read_bytes()))  # a file's content is sent once, however many want it
    where = device()
    backend = RayBackend(gpus=1 / execution.per_gpu() if where == "cuda" else 0)
    parallel = joblib.Parallel(n_jobs=-1, return_as="generator_unordered", backend=backend)
    here = joblib.delayed(_unpacked)
    torch_version = importlib.metadata.version("torch")
    found: Iterator[T] = parallel(here(call, {p: put(p) for p in paths}, torch_version, where) for call, paths in calls)
    return found


def _unpacked(call: Callable[[], T], files: Mapping[Path, Any], torch_version: str, where: str) -> T:
    """On some machine of the cluster: lay out the files in a folder, and make the call there."""
    found = importlib.metadata.version("torch")
    if found != torch_version:
        address = ray.util.get_node_ip_address()
        raise UserError(f"machine {address} has torch {found}, but the study runs with {torch_version}: install that")
    os.environ["PHASEGATE_DEVICE"] = where
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for path, content in files.items():
            write_atomic(path, ray.get(content))
        return call()


class RayBackend(ParallelBackendBase):  # type: ignore[misc]
    """Each call of joblib is a Ray task on a processor of its own, with a share of a GPU if it needs one."""

    supports_retrieve_callback = True

    def __init__(self, gpus: float = 0.0, **ignored: Any) -> None:
        super().__init__(**ignored)
        self.gpus, self.running = gpus, set[Any]()

    def configure(self, n_jobs: int = 1, parallel: Any = None, **_: Any) -> int:
        """Joblib begins."""
        self.parallel = parallel
        self.task = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=RETRIES)(_call)
        return self.effective_n_jobs(n_jobs)

    def effective_n_jobs(self, n_jobs: int) -> int:
        """As many calls run at once as the cluster has room for."""
        room = ray.cluster_resources()
        shares = room.get("GPU", 0) / self.gpus if self.gpus else float("inf")
        return max(1, int(min(room.get("CPU", 1), shares)))

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], None]) -> Future[Any]:
        """Joblib has a call to make."""
        reference = self.task.remote(func)
        self.running.add(reference)
        future: Future[Any] = reference.future()
        future.add_done_callback(lambda _: self.running.discard(reference))
        future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, future: Future[Any]) -> Any:
        """Joblib wants what a call returned, or the error that it raised."""
        try:
            return future.result()
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"a trial was lost with its machine {RETRIES + 1} times, the last: {reason}") from None

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Joblib gives up, so every call that still runs or waits does too."""
        for reference in list(self.running):
            ray.cancel(reference, force=True)


def _call(function: Callable[[], T]) -> T:
    return function()
