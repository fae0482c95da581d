"""Phase 7b.1: a control head trained on random labels."""

from phasegate.control import Control
from phasegate.params import Params
from phasegate.phase import Arm, continuations
from phasegate.stage import BASELINES, MODELS, PREPARED, run
from phasegate.trials import run_trials


def main(params: Params) -> None:
    """Separate the noise in the labels, its gradient in the trunk, and naive surgery."""
    labels = params.p7b1
    arms = [
        Arm("noise_acting", Control(labels, head=True, acts=True, detach=False), grow="reinit"),
        Arm("noise", Control(labels, head=True, acts=False, detach=False)),
        Arm("noise_detached", Control(labels, head=True, acts=False)),
        Arm("random_acting", Control(labels, head=False, acts=True), grow="reinit"),
    ]
    trials = continuations(PREPARED, BASELINES, "p7b1", arms, params.seeds, params.p7b)
    run_trials(trials, MODELS / "p7b1", "p7b1")


if __name__ == "__main__":
    run(main)
