"""Measure on the 7a checkpoints what surgery would do: what control heads learn from, and signals are judged by."""

from phasegate.base.paths import BASELINES, PREPARED, SURVEYS
from phasegate.params import Params
from phasegate.signals.survey import surveys
from phasegate.stage import run
from phasegate.trials.run import run_trials


def main(params: Params) -> None:
    """Survey every seed."""
    trials = surveys(PREPARED, BASELINES, params.seeds.all, params.p7b, params.p7b4)
    run_trials(trials, SURVEYS)


if __name__ == "__main__":
    run(main)
