"""Thirty splits in a row, and thirty clones: what is left of the function?"""

import pandas as pd

from phasegate.failure import finished
from phasegate.files import write_atomic
from phasegate.params import Params
from phasegate.preservation import in_a_row
from phasegate.stage import BASELINES, PREPARED, REPORTS, run


def main(params: Params) -> None:
    """Write `reports/preservation.csv`: of every 7a checkpoint, as far as its training didn't fail."""
    starts = {BASELINES / f"seed-{seed}": seed for seed in range(params.seeds)}
    rows = [
        in_a_row(PREPARED, start, starts[start], operation, params.surgery.in_a_row)
        for operation in ("split", "clone")
        for start in finished(starts)
    ]
    write_atomic(REPORTS / "preservation.csv", pd.concat(rows).to_csv(index=False, float_format="%.10g"))


if __name__ == "__main__":
    run(main)
