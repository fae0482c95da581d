"""Check params.yaml before anything runs, and write its schema.

The schema only changes with the code, so a changed parameter reruns this stage and then just what uses it.
"""

import json

from phasegate.check import check
from phasegate.files import write_atomic
from phasegate.params import Params
from phasegate.stage import SCHEMA, run


def main(params: Params) -> None:
    """`params` are checked by now, but for what lies outside of them."""
    check(params)
    write_atomic(SCHEMA, schema())


def schema() -> str:
    """The parameters' JSON schema, which editors can check params.yaml by."""
    return json.dumps(Params.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    run(main)
