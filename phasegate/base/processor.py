"""Name the processor of this machine, and tell whether its bits are those that are promised."""

import os
import re
from pathlib import Path

LISTED = Path("/proc/cpuinfo")  # Linux


def name() -> str:
    """Return the name of this machine's processor and the number of its cores."""
    found = _listed("model name")
    return f"{found or os.uname().machine}, {os.cpu_count()} cores"


def has_avx2() -> bool:
    """Tell whether the processor is an x86-64 with AVX2; one that lists no features, as on a Mac, counts as one."""
    flags = _listed("flags").split()
    return os.uname().machine == "x86_64" and (not flags or {"avx2", "fma"} <= set(flags))


def _listed(key: str) -> str:
    """Return what Linux says of the first core; "" elsewhere."""
    text = LISTED.read_text(encoding="utf-8", errors="replace") if LISTED.exists() else ""
    found = re.search(rf"^{key}\s*: (.+)", text, re.MULTILINE)
    return found[1] if found else ""
