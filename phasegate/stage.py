"""Begin and end every stage: checked parameters in, one clear sentence out if something is wrong."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import phasegate
from phasegate.base import processes
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
            main(params)
    except UserError as error:
        sys.exit(_say(str(error)))
    except OSError as error:  # a full disk, a file that vanished, no permission
        sys.exit(_say(f"{error.filename or 'a file'}: {error.strerror or error}"))
    except KeyboardInterrupt:
        processes.say_stopped()


def _say(sentence: str) -> int:
    print(f"{Path(sys.argv[0]).stem}: {sentence}", file=sys.stderr)
    return 2
