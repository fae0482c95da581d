"""metrics.json: the row of the phase that `headline.phase` names, for `dvc metrics diff` across phases."""

import json
from pathlib import Path

import pandas as pd

from phasegate.decisions import metrics
from phasegate.files import read_json, write_atomic
from phasegate.params import Params
from phasegate.stage import REPORTS, run


def main(params: Params) -> None:
    """Write `metrics.json`."""
    decisions = pd.DataFrame(read_json(REPORTS / "decisions.json"))
    row = metrics(decisions, params.headline.phase, params.headline.arm)
    write_atomic(Path("metrics.json"), json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
