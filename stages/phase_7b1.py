"""Phase 7b.1: a control head trained on random labels."""

from phasegate.control import HeadControl, LabelControl
from phasegate.params import Params
from phasegate.phase import Arm, continuations
from phasegate.stage import BASELINES, MODELS, PREPARED, run
from phasegate.surgeon import Treatment
from phasegate.trials import run_trials


def main(params: Params) -> None:
    """Separate the noise in the labels, its gradient in the trunk, and each kind of surgery."""
    labels = params.p7b1
    arms = [
        Arm("noise_acting", Treatment(HeadControl(labels, acts="sample", detach=False), grow="reinit")),
        Arm("noise", Treatment(HeadControl(labels, acts="never", detach=False))),
        Arm("noise_detached", Treatment(HeadControl(labels, acts="never"))),
        Arm("random_acting", Treatment(LabelControl(labels), grow="reinit")),
        Arm("random_split", Treatment(LabelControl(labels), grow="split")),
        Arm("random_clone", Treatment(LabelControl(labels), grow="clone")),
    ]
    trials = continuations(PREPARED, BASELINES, "p7b1", arms, params.seeds, params.p7b)
    run_trials(trials, MODELS / "p7b1", "p7b1")


if __name__ == "__main__":
    run(main)
