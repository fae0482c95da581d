"""Phase 7b.2: routing entropy as the signal."""

from phasegate.control import HeadControl, LabelControl
from phasegate.params import Params
from phasegate.phase import Arm, continuations
from phasegate.stage import BASELINES, MODELS, PREPARED, run
from phasegate.surgeon import Treatment
from phasegate.trials import run_trials


def main(params: Params) -> None:
    """A control head and bare thresholds, each with three kinds of growth; the entropy as a regulariser."""
    entropy = params.p7b2
    control, thresholds = HeadControl(entropy.labels, acts="argmax"), LabelControl(entropy.labels)
    arms = [
        Arm("split", Treatment(control, grow="split")),
        Arm("clone", Treatment(control, grow="clone")),
        Arm("reinit", Treatment(control, grow="reinit")),
        Arm("split_thresholds", Treatment(thresholds, grow="split")),
        Arm("clone_thresholds", Treatment(thresholds, grow="clone")),
        Arm("reinit_thresholds", Treatment(thresholds, grow="reinit")),
        Arm("entropy_loss", entropy_weight=entropy.entropy_weight),
    ]
    trials = continuations(PREPARED, BASELINES, "p7b2", arms, params.seeds, params.p7b)
    run_trials(trials, MODELS / "p7b2", "p7b2")


if __name__ == "__main__":
    run(main)
