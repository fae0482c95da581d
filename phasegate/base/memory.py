"""Measure the memory of this machine."""

import os
import resource
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup/memory.max")  # the limit of a container on Linux


def memory() -> int:
    """Return the bytes of memory of this machine, or what its container or `ulimit -v` leaves this process of it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        physical = min(physical, limit)
    try:
        return min(physical, int(CGROUP.read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no such limit: "max"
        return physical
