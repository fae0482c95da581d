"""Begin and end every stage: checked parameters in, one clear sentence out if something is wrong."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import phasegate
from phasegate.base import processes, processor, settings, timings
from phasegate.base.errors import UserError
from phasegate.params import Params, load_params


def run(main: Callable[[Params], None]) -> None:
    """Run a stage on the checked parameters; errors meant for people end it with exit code 2, bugs with a traceback."""
    processes.on_stop(signal.default_int_handler)  # which ends what is half done, and then `run`
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # loky's, of a run that was stopped
    try:
        if phasegate.UNPINNED:
            raise UserError(phasegate.UNPINNED)
        params = load_params()
        with processes.alone():
            begun = time.perf_counter()
            main(params)
            _tell(time.perf_counter() - begun)
    except UserError as error:
        sys.exit(_say(str(error)))
    except OSError as error:  # a full disk, a file that vanished, no permission
        sys.exit(_say(f"{error.filename or 'a file'}: {error.strerror or error}"))
    except KeyboardInterrupt:
        processes.say_stopped()


def _tell(seconds: float) -> None:
    """Tell the terminal and `reports/timings.csv` how long the stage took."""
    stage, machine = os.environ.get("DVC_STAGE") or Path(sys.argv[0]).stem, processor.name()
    timings.record(stage, {"": (seconds, machine)})
    if settings.progress():
        print(f"{stage}: {seconds:,.1f} s on {machine}", file=sys.stderr)


def _say(sentence: str) -> int:
    print(f"{Path(sys.argv[0]).stem}: {sentence}", file=sys.stderr)
    return 2
