"""Score every signal on the 7a checkpoints: how well does it tell which experts to prune, and which to grow?"""

import pandas as pd

from phasegate.failure import finished
from phasegate.files import write_atomic
from phasegate.own import signals
from phasegate.params import Params
from phasegate.scoring import SCORES, scorings
from phasegate.stage import BASELINES, HEADS, MODELS, PREPARED, REPORTS, SURVEYS, run
from phasegate.table_files import read_table
from phasegate.trials import run_trials


def main(params: Params) -> None:
    """Write `reports/signals.csv`, of all seeds whose trials didn't fail."""
    folder = MODELS / "signals"
    trials = scorings(PREPARED, BASELINES, SURVEYS, HEADS, params.seeds, params.p7b, signals(params))
    run_trials(trials, folder, "signals")
    table = pd.concat([read_table(scored / SCORES) for scored in finished(folder / trial.name for trial in trials)])
    write_atomic(REPORTS / "signals.csv", table.to_csv(index=False, float_format="%.10g"))


if __name__ == "__main__":
    run(main)
