"""Measure the memory of this machine."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup/memory.max")  # the limit of a container on Linux


def memory() -> int:
    """Return the bytes of memory of this machine, or of the container that this process runs in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(CGROUP.read_text()))
    except (OSError, ValueError):  # no such limit: "max"
        return physical
