"""Where and how to run: settings from the environment, which must never change results.

PHASEGATE_WORKERS   processes per stage (default: one per core)
PHASEGATE_DEVICE    auto | cpu | cuda (default: auto, a GPU where there is one)
PHASEGATE_PROGRESS  0 for no progress bars
"""

import os

import joblib
import torch

from phasegate.errors import UserError


def workers() -> int:
    """How many trials run at once."""
    value = os.environ.get("PHASEGATE_WORKERS", "")
    if not value:
        return int(joblib.cpu_count(only_physical_cores=False))
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"PHASEGATE_WORKERS is {value!r}: it must be a whole number from 1")
    return int(value)


def device() -> torch.device:
    """The device that trials train on."""
    value = os.environ.get("PHASEGATE_DEVICE", "auto")
    if value not in ("auto", "cpu", "cuda"):
        raise UserError(f"PHASEGATE_DEVICE is {value!r}: it must be auto, cpu or cuda")
    available = torch.cuda.is_available()
    if value == "cuda" and not available:
        raise UserError("PHASEGATE_DEVICE is cuda, but torch finds no GPU here: use auto or cpu")
    torch.backends.cudnn.allow_tf32 = False  # a checkpoint made here must count the same on a CPU
    return torch.device("cuda" if available and value != "cpu" else "cpu")


def progress() -> bool:
    """Whether to show progress."""
    return os.environ.get("PHASEGATE_PROGRESS", "1") != "0"
