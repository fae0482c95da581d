"""Split many times in a row, and clone many times, and measure what is left of the function."""

import pandas as pd

from phasegate.base.paths import BASELINES, MODELS, PREPARED
from phasegate.params import Params
from phasegate.records.tables import write_table
from phasegate.records.trial_folder import finished
from phasegate.stage import run
from phasegate.surgery.in_a_row import in_a_row


def main(params: Params) -> None:
    """Write `models/in_a_row.csv`, of every 7a checkpoint whose training did not fail."""
    starts = {BASELINES / f"seed-{seed}": seed for seed in params.seeds.all}
    rows = [
        in_a_row(PREPARED, start, starts[start], operation, params.surgery.in_a_row)
        for operation in ("split", "clone")
        for start in finished(starts)
    ]
    write_table(MODELS / "in_a_row.csv", pd.concat(rows))


if __name__ == "__main__":
    run(main)
