"""Begin and end every stage: checked parameters in, one clear sentence out if something is wrong."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from phasegate.base import processes
from phasegate.base.errors import report_user_errors
from phasegate.params import Params, load_params


def run(main: Callable[[Params], None]) -> None:
    """Run a stage on the checked parameters; errors meant for people end it with exit code 2, bugs with a traceback."""
    processes.on_stop(signal.default_int_handler)  # which ends what is half done, and then `run`
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # loky's, of a run that was stopped
    try:
        with report_user_errors(Path(sys.argv[0]).stem):
            params = load_params()
            with processes.alone():
                main(params)
    except KeyboardInterrupt:
        processes.say_stopped()
