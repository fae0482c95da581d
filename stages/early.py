"""Train the early steps of 7c.1 and 7c.2, which arms share."""

from phasegate.base.paths import EARLY
from phasegate.params import Params
from phasegate.stage import run
from phasegate.surgery.growing import early_plans, early_trials
from phasegate.trials.run import run_trials


def main(params: Params) -> None:
    """Fill `models/early`."""
    run_trials(early_trials(params, EARLY.name, params.seeds.all, early_plans(params)), EARLY)


if __name__ == "__main__":
    run(main)
