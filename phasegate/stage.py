"""How every stage begins and ends: parameters in, one clear sentence out if something is wrong."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from phasegate import PARENT, processes
from phasegate.errors import UserError
from phasegate.params import Params, load_params

SCHEMA = Path("data/params.schema.json")
PREPARED = Path("data/prepared")
EVALUATED = Path("data/evaluated")
MODELS = Path("models")
BASELINES = MODELS / "p7a/baseline"
SURVEYS = MODELS / "survey"
HEADS = MODELS / "heads"
REPORTS = Path("reports")


def run(main: Callable[[Params], None]) -> None:
    """Run a stage on the checked parameters; errors meant for people end it with exit code 2, bugs with a traceback."""
    processes.terminate_as_interrupt()
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # loky's, of a run that was stopped
    if "DVC_STAGE" in os.environ:
        processes.end_with(PARENT)
    try:
        params = load_params()
        with processes.alone():
            main(params)
    except UserError as error:
        sys.exit(_say(str(error), 2))
    except OSError as error:  # a full disk, a file that vanished, no permission
        sys.exit(_say(f"{error.filename or 'a file'}: {error.strerror or error}", 2))
    except KeyboardInterrupt:
        _say("stopped; `dvc repro` goes on where it was", 130)
        processes.leave(130)


def _say(sentence: str, code: int) -> int:
    print(f"{Path(sys.argv[0]).stem}: {sentence}", file=sys.stderr)
    return code
