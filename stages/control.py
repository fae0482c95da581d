"""Continue training the 7a checkpoints with nothing added: the control arm of every 7b phase."""

from phasegate.base.paths import BASELINES, MODELS, PREPARED
from phasegate.params import Params
from phasegate.params.names import CONTROL, START
from phasegate.stage import run
from phasegate.surgery.continuation import Arm, continuations
from phasegate.trials.run import run_trials


def main(params: Params) -> None:
    """Fill `models/control`. The control belongs to phase 7a, as its second arm."""
    trials = continuations(PREPARED, BASELINES, START, {CONTROL: Arm()}, params.seeds.all, params.p7b)
    run_trials(trials, MODELS / "control")


if __name__ == "__main__":
    run(main)
