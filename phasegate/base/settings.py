"""Read from the environment where and how to run. These settings must never change results.

PHASEGATE_WORKERS   processes per stage (default: one per core); on a GPU at most as many as it has GiB free
PHASEGATE_DEVICE    auto | cpu | cuda (default: auto, a GPU where there is one)
PHASEGATE_PROGRESS  0 for no progress bars
PHASEGATE_BACKEND   processes | ray: trials in processes here (the default), or on the Ray cluster of RAY_ADDRESS
PHASEGATE_PER_GPU   trials that share a GPU of the cluster (default: 1)
PHASEGATE_SNAPSHOT  seconds between snapshots of a trial, from which a killed run resumes (default: 10)
"""

import os
from importlib.util import find_spec

from phasegate.base.errors import UserError


def workers() -> int:
    """Return how many trials run at the same time."""
    import joblib  # which takes a quarter of a second, and knows what containers allow

    return _read_number("PHASEGATE_WORKERS", joblib.cpu_count(only_physical_cores=False))


def per_gpu() -> int:
    """Return how many trials share a GPU of the cluster."""
    return _read_number("PHASEGATE_PER_GPU", 1)


def backend() -> str:
    """Return where trials run: in processes of this machine, or on a Ray cluster (ray)."""
    value = _read_choice("PHASEGATE_BACKEND", "processes", "ray")
    if value == "ray" and not find_spec("ray"):
        raise UserError("PHASEGATE_BACKEND is ray, but Ray is not installed here: pip install -e '.[cluster]'")
    return value


def wanted_device() -> str:
    """Return the device that the user asks for: auto, cpu or cuda."""
    return _read_choice("PHASEGATE_DEVICE", "auto", "cpu", "cuda")


def progress() -> bool:
    """Return whether to show progress."""
    return os.environ.get("PHASEGATE_PROGRESS", "1") != "0"


def snapshot_seconds() -> int:
    """Return the seconds between two snapshots of a trial."""
    return _read_number("PHASEGATE_SNAPSHOT", 10, least=0)


def _read_number(name: str, default: int, least: int = 1) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"{name} is {value!r}: it must be a whole number from {least}")
    return int(value)


def _read_choice(name: str, default: str, *others: str) -> str:
    value, known = os.environ.get(name, default), (default, *others)
    if value not in known:
        raise UserError(f"{name} is {value!r}: it must be {', '.join(known[:-1])} or {known[-1]}")
    return value
