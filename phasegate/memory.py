"""How much memory training takes at least, and how much this machine has."""

import os
from pathlib import Path

from phasegate.errors import UserError
from phasegate.params import Params
from phasegate.pretraining_params import Architecture

COPIES = 4  # of every weight: itself, its gradient, and Adam's two moments
GIB = 1 << 30
CGROUP = Path("/sys/fs/cgroup/memory.max")  # where a container on Linux is told its limit


def refuse_too_large(params: Params) -> None:
    """Raises UserError if one trial of an architecture can't fit into this machine's memory, if it runs here."""
    if os.environ.get("PHASEGATE_BACKEND") == "ray":
        return
    there = memory()
    for key, architecture in params.architectures().items():
        sizes = {f"{key}.n_routed": architecture.n_routed}
        if architecture.n_routed == params.p7a.n_routed:  # it may become the baseline, which grows
            sizes["p7b.max_experts"] = params.p7b.max_experts
        for name, experts in sizes.items():
            if (needed := training_bytes(architecture, experts)) > there:
                raise UserError(
                    f"{name} is {experts}: with the widths of {key}, a single trial needs {needed / GIB:,.1f} GiB for "
                    f"weights, gradients and moments, and this machine has {there / GIB:,.1f} GiB"
                )


def training_bytes(architecture: Architecture, experts: int) -> int:
    """What the weights of all blocks, with so many experts each, take in training (float32)."""
    per_expert = 2 * architecture.width * architecture.expert_width
    return 4 * COPIES * architecture.blocks * (experts + architecture.n_shared) * per_expert


def memory() -> int:
    """Bytes of memory of this machine, or of the container that this is."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(CGROUP.read_text()))
    except (OSError, ValueError):  # no such limit: "max"
        return physical
