"""Run trials as tasks of a Ray cluster.

A task runs on any free processor, and Ray starts it again elsewhere when its machine is lost. No disk is shared: the
library's code and a trial's input files are sent, and the files that the trial wrote come back.
"""

import contextlib
import importlib.metadata
import logging
import os
import re
import socket
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.exceptions

import phasegate
from phasegate.base import settings
from phasegate.base.errors import UserError
from phasegate.base.files import write_atomic

RETRIES = 5  # of a call whose machine was lost
SECONDS_TO_ANSWER = 10
T = TypeVar("T")


def connect() -> None:
    """Join the cluster of RAY_ADDRESS or of this machine, or start one here; `UserError` if it cannot be joined."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default: silences its warning
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        if port := re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address):
            socket.create_connection((port[1], int(port[2])), SECONDS_TO_ANSWER).close()  # Ray would try for minutes
    except OSError:
        raise UserError(f"no Ray cluster answers at RAY_ADDRESS={address}") from None
    pinned = phasegate.PINNED if phasegate.PROMISED else {}  # a task may import numpy before phasegate
    code = {"py_modules": [str(Path(phasegate.__file__).parent)], "env_vars": pinned}
    try:
        ray.init(runtime_env=code, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError):
        advice = "if it asks for a token, set RAY_AUTH_MODE=token (docs/cluster.md)"
        raise UserError(f"the Ray cluster at RAY_ADDRESS={address} can't be joined: {advice}") from None


def device() -> str:
    """Name the kind of device of tasks: cuda if the cluster has GPUs and they are wanted, else cpu."""
    connect()
    wanted, found = settings.wanted_device(), bool(ray.cluster_resources().get("GPU"))
    if wanted == "cuda" and not found:
        raise UserError("PHASEGATE_DEVICE is cuda, but the Ray cluster has no GPU: use auto or cpu")
    return "cuda" if found and wanted != "cpu" else "cpu"


def results(calls: Iterable[tuple[Callable[[], T], tuple[Path, ...]]]) -> Generator[T]:
    """Yield the result of each call, in the order in which they end; each call comes with the files that it reads.

    Raises `UserError` if a call raises it, loses its machine again and again, or finds another version of torch.
    """
    where, torch_version = device(), importlib.metadata.version("torch")
    gpus = 1 / settings.per_gpu() if where == "cuda" else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_run_with_files)
    put = cache(lambda path: ray.put(path.read_bytes()))  # a file is sent once, for all tasks
    running = [task.remote(call, {p: put(p) for p in paths}, torch_version, where) for call, paths in calls]
    try:
        while running:
            (done,), running = ray.wait(running)
            yield ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"a trial was lost with its machine {RETRIES + 1} times, the last: {reason}") from None
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _run_with_files(call: Callable[[], T], files: Mapping[Path, Any], torch_version: str, where: str) -> T:
    """Write the files into a folder of a machine of the cluster, and make the call there."""
    found = importlib.metadata.version("torch")
    if found != torch_version:
        address = ray.util.get_node_ip_address()
        raise UserError(f"machine {address} has torch {found}, but the study runs with {torch_version}: install that")
    os.environ["PHASEGATE_DEVICE"] = where
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for path, content in files.items():
            write_atomic(path, ray.get(content))
        return call()
