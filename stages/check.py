"""Check params.yaml before anything runs, and write its schema.

The schema changes with the code alone, so a changed parameter reruns this stage and the stages that use it.
"""

import json

from phasegate.base.files import write_atomic
from phasegate.base.paths import SCHEMA
from phasegate.params import Params
from phasegate.params.check import check
from phasegate.stage import run


def main(params: Params) -> None:
    """Check what the parameters need from outside: memory, and files in `plugins/`."""
    check(params)
    write_atomic(SCHEMA, schema())


def schema() -> str:
    """Return the JSON schema of the parameters, by which editors can check params.yaml."""
    return json.dumps(Params.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    run(main)
