"""Score every signal on the 7a checkpoints: what does it say of pruning, growing and the dead?"""

import pandas as pd

from phasegate.base.paths import BASELINES, HEADS, MODELS, PREPARED, SURVEYS
from phasegate.params import Params
from phasegate.records.tables import read_table, write_table
from phasegate.records.trial_folder import finished
from phasegate.signals.plugin_arms import plugin_signals
from phasegate.signals.signal_scores import SCORES, scorings
from phasegate.stage import run
from phasegate.trials.run import run_trials


def main(params: Params) -> None:
    """Write `models/signals.csv`, of all seeds whose trials did not fail."""
    folder = MODELS / "signals"
    course = params.seeds.all, params.p7b, params.p7c3.dead
    trials = scorings(PREPARED, BASELINES, SURVEYS, HEADS, *course, plugin_signals(params))
    run_trials(trials, folder)
    table = pd.concat([read_table(scored / SCORES) for scored in finished(folder / trial.name for trial in trials)])
    write_table(MODELS / "signals.csv", table)


if __name__ == "__main__":
    run(main)
