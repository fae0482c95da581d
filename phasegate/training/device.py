"""Choose the device that models train and run on."""

import os
import sys

import torch

from phasegate.base import settings
from phasegate.base.errors import UserError, one_line

PER_TRIAL = 1 << 30  # bytes of a GPU's memory: torch's own, and a small model with its optimizer


def device() -> torch.device:
    """Return the device of this machine that PHASEGATE_DEVICE asks for, and let torch use one thread.

    How a sum is divided among threads decides how it is rounded. A GPU that is there but can't compute, as under too
    old a driver, counts as none, which is said. Raises `UserError` if there is no GPU and one is asked for.
    """
    wanted, available = settings.wanted_device(), torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("PHASEGATE_DEVICE is cuda, but torch finds no GPU here: use auto or cpu")
    if available and wanted != "cpu" and (why := find_failure("cuda")):
        if wanted == "cuda":
            raise UserError(f"PHASEGATE_DEVICE is cuda, but the GPU here can't be used: {why}")
        print(f"the GPU here can't be used, so trials run on the CPU: {why}", file=sys.stderr, flush=True)
        wanted = os.environ["PHASEGATE_DEVICE"] = "cpu"  # for workers too
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # a checkpoint made here must count the same on a CPU
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


def workers() -> int:
    """Return how many trials run at the same time: no more than a GPU that they share has free memory for."""
    if device().type == "cpu":
        return settings.workers()
    return max(1, min(settings.workers(), torch.cuda.mem_get_info()[0] // PER_TRIAL))


def start_method() -> str:
    """Return how worker processes start: as copies of this one, but anew where a GPU's driver or macOS forbids that."""
    return "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"


def find_failure(name: torch.device | str) -> str:
    """Return why a device can't compute, float64 included; "" if it can."""
    try:
        torch.empty(1, dtype=torch.float64, device=name).zero_().cpu()
    except (RuntimeError, AssertionError, TypeError) as error:
        return one_line(error)
    return ""
