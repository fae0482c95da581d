"""Arms of one's own, as `own.arms` describes them: see docs/extending.md. There may be none."""

from phasegate.own import arms
from phasegate.params import Params
from phasegate.phase import continuations
from phasegate.stage import BASELINES, MODELS, PREPARED, run
from phasegate.study import OWN
from phasegate.trials import run_trials


def main(params: Params) -> None:
    """Go on from the 7a checkpoints under every arm that the parameters describe."""
    trials = continuations(PREPARED, BASELINES, OWN, arms(params), params.seeds, params.p7b)
    run_trials(trials, MODELS / OWN, OWN)


if __name__ == "__main__":
    run(main)
