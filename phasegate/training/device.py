"""Choose the device that models train and run on."""

import torch

from phasegate.base import settings
from phasegate.base.errors import UserError


def device() -> torch.device:
    """Return the device of this machine that PHASEGATE_DEVICE asks for, and let torch use one thread.

    How a sum is divided among threads decides how it is rounded. Raises `UserError` if there is no GPU.
    """
    wanted, available = settings.wanted_device(), torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("PHASEGATE_DEVICE is cuda, but torch finds no GPU here: use auto or cpu")
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # a checkpoint made here must count the same on a CPU
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")
