"""The scripts that dvc.yaml runs, as in `python -m stages.pretrain`; `phasegate.stage.run` begins and ends each."""

import os
import sys

from phasegate import PARENT, processes

if sys.argv[0] == "-m":  # a script of this folder is about to import what it needs, which takes seconds
    processes.when_stopped(processes.say_stopped)
    if "DVC_STAGE" in os.environ:
        processes.end_with(PARENT)
