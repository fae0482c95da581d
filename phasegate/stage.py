"""Begin and end every stage: checked parameters in, one clear sentence out if something is wrong."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import phasegate
from phasegate.base import processes, processor, settings, timings, used
from phasegate.base.errors import UserError, report_user_errors
from phasegate.params import Params, load_params


def run(main: Callable[[Params], None]) -> None:
    """Run a stage on the checked parameters; errors meant for people end it with exit code 2, bugs with a traceback.

    One is a file that the stage used and that has changed meanwhile: DVC hashes files only when a stage has ended.
    """
    used.begin()
    processes.on_stop(signal.default_int_handler)  # which ends what is half done, and then `run`
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # of spawned workers, when a run is stopped
    try:
        with report_user_errors(Path(sys.argv[0]).stem):
            if phasegate.UNPINNED:
                raise UserError(phasegate.UNPINNED)
            params = load_params()
            with processes.alone():
                begun = time.perf_counter()
                main(params)
                used.check()
                _tell(time.perf_counter() - begun)
    except KeyboardInterrupt:
        processes.say_stopped()


def _tell(seconds: float) -> None:
    """Tell the terminal and `reports/timings.csv` how long the stage took."""
    stage, machine = os.environ.get("DVC_STAGE") or Path(sys.argv[0]).stem, processor.name()
    timings.record(stage, {"": (seconds, machine)})
    if settings.progress():
        print(f"{stage}: {seconds:,.1f} s on {machine}", file=sys.stderr)
