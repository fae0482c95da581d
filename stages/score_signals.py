"""Score every signal on the 7a checkpoints: how well does it tell which experts to prune, and which to grow?"""

import pandas as pd

from phasegate.files import write_atomic
from phasegate.params import Params
from phasegate.scoring import SCORES, scorings
from phasegate.stage import BASELINES, HEADS, MODELS, PREPARED, REPORTS, SURVEYS, run
from phasegate.trials import run_trials


def main(params: Params) -> None:
    """Write `reports/signals.csv`."""
    folder = MODELS / "signals"
    trials = scorings(PREPARED, BASELINES, SURVEYS, HEADS, params.seeds, params.p7b)
    run_trials(trials, folder, "signals")
    table = pd.concat([pd.read_csv(folder / trial.name / SCORES) for trial in trials])
    write_atomic(REPORTS / "signals.csv", table.to_csv(index=False, float_format="%.10g"))


if __name__ == "__main__":
    run(main)
