"""Hold the scripts that dvc.yaml runs, as in `python -m stages.p7a`."""

import os
import sys

from phasegate.base import processes, used

if sys.argv[0] == "-m":  # a script of this folder will be imported, and torch, which takes seconds
    used.begin()
    processes.on_stop(processes.say_stopped)
    if "DVC_STAGE" in os.environ:
        processes.end_with(os.getppid())  # the `dvc` that started it
