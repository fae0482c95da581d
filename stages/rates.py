"""Choose how fast the matrices of experts learn, once a model may have grown, for each way to have experts."""

from math import nan
from pathlib import Path

import pandas as pd
import yaml

from phasegate.base.errors import UserError
from phasegate.base.files import write_atomic
from phasegate.base.paths import MODELS
from phasegate.params import Params
from phasegate.records.tables import write_table
from phasegate.records.trial_folder import read_failure
from phasegate.stage import run
from phasegate.surgery.growing import early_trials, late_trials, operators
from phasegate.training import checkpoint
from phasegate.trials.run import run_trials

COLUMNS = ["operator", "factor", "seed", "accuracy", "chosen"]  # accuracy: gate split, percent; blank if it failed


def main(params: Params) -> None:
    """Try every rate in seeds that no verdict uses, and choose by the mean accuracy on the gate split."""
    seeds, folder, growing = params.p7c.seeds.all, MODELS / "rates", params.p7c
    tried = {
        f"{operator}_x{rate:g}".replace(".", "_"): (operator, start, arm, rate)
        for operator, (start, arm) in operators(params).items()
        for rate in growing.rates
    }
    early = early_trials(params, folder.name, seeds, ("early", "at", "large"))
    arms = {name: case[1:] for name, case in tried.items()}
    run_trials([*early, *late_trials(params, folder.name, seeds, arms, folder)], folder)
    rows = [
        (operator, rate, seed, accuracy(folder, name, seed))
        for name, (operator, _, _, rate) in tried.items()
        for seed in seeds
    ]
    table = pd.DataFrame(rows, columns=COLUMNS[:-1])
    whole = table[table.groupby(["operator", "factor"])["accuracy"].transform("count") == len(seeds)]
    chosen = {}
    for operator in operators(params):
        means = whole[whole["operator"] == operator].groupby("factor")["accuracy"].mean().to_dict()
        if not means:
            raise UserError(f"every rate of {operator} failed in some seed of p7c.seeds: try lower ones in p7c.rates")
        chosen[operator] = max(means, key=lambda rate: means[rate])
    table["chosen"] = table["factor"] == table["operator"].map(chosen)
    write_table(folder.with_suffix(".csv"), table, digits=None)
    write_atomic(folder.with_suffix(".yaml"), yaml.safe_dump({"rates": chosen}, sort_keys=False))


def accuracy(folder: Path, case: str, seed: int) -> float:
    """Return the gate accuracy (percent) of a trial; NaN if it failed."""
    trial = folder / case / f"seed-{seed}"
    return nan if read_failure(trial) else checkpoint.summary(trial)[1]


if __name__ == "__main__":
    run(main)
