"""Where and how to run: settings from the environment, which must never change results.

PHASEGATE_WORKERS   processes per stage (default: one per core)
PHASEGATE_DEVICE    auto | cpu | cuda (default: auto, a GPU where there is one)
PHASEGATE_PROGRESS  0 for no progress bars
PHASEGATE_BACKEND   loky | ray: trials in processes here (the default), or on the Ray cluster of RAY_ADDRESS
PHASEGATE_PER_GPU   trials that share a GPU of the cluster (default: 1)
PHASEGATE_SNAPSHOT  seconds between snapshots of a trial in training, which a killed run goes on from (default: 10)
"""

import os
from importlib.util import find_spec

import joblib
import torch

from phasegate.errors import UserError


def workers() -> int:
    """How many trials run at once."""
    return _whole("PHASEGATE_WORKERS") or int(joblib.cpu_count(only_physical_cores=False))


def per_gpu() -> int:
    """How many trials share a GPU of the cluster."""
    return _whole("PHASEGATE_PER_GPU") or 1


def backend() -> str:
    """Where trials run: in processes of this machine (loky), or on a Ray cluster."""
    value = _one_of("PHASEGATE_BACKEND", "loky", "ray")
    if value == "ray" and not find_spec("ray"):
        raise UserError("PHASEGATE_BACKEND is ray, but Ray is not installed here: pip install 'phasegate[cluster]'")
    return value


def wanted_device() -> str:
    """What was asked for: auto, cpu or cuda."""
    return _one_of("PHASEGATE_DEVICE", "auto", "cpu", "cuda")


def device() -> torch.device:
    """The device that trials train on, here."""
    value = wanted_device()
    available = torch.cuda.is_available()
    if value == "cuda" and not available:
        raise UserError("PHASEGATE_DEVICE is cuda, but torch finds no GPU here: use auto or cpu")
    torch.backends.cudnn.allow_tf32 = False  # a checkpoint made here must count the same on a CPU
    return torch.device("cuda" if available and value != "cpu" else "cpu")


def progress() -> bool:
    """Whether to show progress."""
    return os.environ.get("PHASEGATE_PROGRESS", "1") != "0"


def snapshot_seconds() -> int:
    """How long a trial trains from one snapshot on disk to the next."""
    found = _whole("PHASEGATE_SNAPSHOT", least=0)
    return 10 if found is None else found


def _whole(name: str, least: int = 1) -> int | None:
    value = os.environ.get(name, "")
    if value and (not value.isdecimal() or int(value) < least):
        raise UserError(f"{name} is {value!r}: it must be a whole number from {least}")
    return int(value) if value else None


def _one_of(name: str, default: str, *others: str) -> str:
    value, known = os.environ.get(name, default), (default, *others)
    if value not in known:
        raise UserError(f"{name} is {value!r}: it must be {', '.join(known[:-1])} or {known[-1]}")
    return value
