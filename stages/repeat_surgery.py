"""Thirty splits in a row, and thirty clones: what is left of the function?"""

import pandas as pd

from phasegate.files import write_atomic
from phasegate.params import Params
from phasegate.preservation import in_a_row
from phasegate.stage import BASELINES, PREPARED, REPORTS, run


def main(params: Params) -> None:
    """Write `reports/preservation.csv`."""
    rows = [
        in_a_row(PREPARED, BASELINES / f"seed-{seed}", seed, operation, params.surgery.in_a_row)
        for operation in ("split", "clone")
        for seed in range(params.seeds)
    ]
    write_atomic(REPORTS / "preservation.csv", pd.concat(rows).to_csv(index=False, float_format="%.10g"))


if __name__ == "__main__":
    run(main)
