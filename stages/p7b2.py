"""Run phase 7b.2: routing entropy as the signal."""

from phasegate.params import Params
from phasegate.stage import run
from phasegate.surgery.continuation import Arm, run_phase
from phasegate.surgery.controllers import HeadPolicy, LabelPolicy
from phasegate.surgery.surgeon import Treatment


def main(params: Params) -> None:
    """Compare a control head and bare thresholds, each with three kinds of growth, and the entropy in the loss."""
    head = HeadPolicy(params.p7b2.labels, acts="argmax")
    thresholds = LabelPolicy(params.p7b2.labels)
    arms = {
        "split": Arm(Treatment(head, grow="split")),
        "clone": Arm(Treatment(head, grow="clone")),
        "reinit": Arm(Treatment(head, grow="reinit")),
        "split_thresholds": Arm(Treatment(thresholds, grow="split")),
        "clone_thresholds": Arm(Treatment(thresholds, grow="clone")),
        "reinit_thresholds": Arm(Treatment(thresholds, grow="reinit")),
        "entropy_loss": Arm(entropy_weight=params.p7b2.entropy_weight),
    }
    run_phase("p7b2", arms, params)


if __name__ == "__main__":
    run(main)
