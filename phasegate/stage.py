"""How every stage begins and ends: parameters in, one clear sentence out if something is wrong."""

import sys
from collections.abc import Callable
from pathlib import Path

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
    try:
        main(load_params())
    except UserError as error:
        sys.exit(_say(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_say("stopped; `dvc repro` goes on with the trials that had not finished", 130))


def _say(sentence: str, code: int) -> int:
    print(f"{Path(sys.argv[0]).stem}: {sentence}", file=sys.stderr)
    return code
