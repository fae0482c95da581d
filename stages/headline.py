"""Write metrics.json, the row of the arm that `headline` names, and the arm's mean learning curve.

`dvc metrics diff` then compares phases, and `dvc plots diff` draws the curves of several phases over each other.
"""

import json
from pathlib import Path

from phasegate.base.files import write_atomic
from phasegate.base.paths import REPORTS, TABLES
from phasegate.params import Params
from phasegate.records.tables import read_table, write_table
from phasegate.stage import run
from phasegate.verdicts.decisions import metrics

CURVE = ["accuracy", "loss", "routing_entropy"]  # on the gate split, percent; in training, nats; on the gate split


def main(params: Params) -> None:
    """Write `metrics.json` and `reports/headline_curve.csv`."""
    row = metrics(read_table(TABLES / "decisions.csv"), params.headline.phase, params.headline.arm)
    curves = read_table(TABLES / "curves.csv")
    curve = curves[(curves["phase"] == row["phase"]) & (curves["arm"] == row["arm"])].groupby("step")[CURVE].mean()
    write_table(REPORTS / "headline_curve.csv", curve.reset_index())
    write_atomic(Path("metrics.json"), json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
