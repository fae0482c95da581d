"""metrics.json: the row of the phase that `headline.phase` names, for `dvc metrics diff` across phases; and its curve.

The curve is that of the same arm, means over seeds, so that `dvc plots diff` lays those of several phases over each
other.
"""

import json
from pathlib import Path

import pandas as pd

from phasegate.decisions import metrics
from phasegate.files import read_json, write_atomic
from phasegate.params import Params
from phasegate.stage import REPORTS, run
from phasegate.table_files import read_table

CURVE = ["accuracy", "loss", "routing_entropy"]  # on the gate split, percent; in training, nats; on the gate split


def main(params: Params) -> None:
    """Write `metrics.json` and `reports/headline_curve.csv`."""
    decisions = pd.DataFrame(read_json(REPORTS / "decisions.json"))
    row = metrics(decisions, params.headline.phase, params.headline.arm)
    curves = read_table(REPORTS / "curves.csv")
    curve = curves[(curves["phase"] == row["phase"]) & (curves["arm"] == row["arm"])].groupby("step")[CURVE].mean()
    write_atomic(REPORTS / "headline_curve.csv", curve.reset_index().to_csv(index=False, float_format="%.10g"))
    write_atomic(Path("metrics.json"), json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
