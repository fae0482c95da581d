"""Run phase 7b.2: routing entropy as the signal."""

from phasegate.base.paths import MODELS
from phasegate.params import Params
from phasegate.stage import run
from phasegate.surgery.continuation import Arm, run_phase
from phasegate.surgery.controllers import HeadPolicy, LabelPolicy, YokedPolicy
from phasegate.surgery.surgeon import Treatment


def main(params: Params) -> None:
    """Compare a head with three kinds of growth, adding and removing alone, random choice, and entropy in the loss."""
    head = HeadPolicy(params.p7b2.labels, acts="argmax")
    thresholds = LabelPolicy(params.p7b2.labels)
    arms = {
        "split": Arm(Treatment(head, grow="split")),
        "clone": Arm(Treatment(head, grow="clone")),
        "reinit": Arm(Treatment(head, grow="reinit")),
        "entropy_loss": Arm(entropy_weight=params.p7b2.entropy_weight),
        "grow": Arm(Treatment(thresholds, prune=None)),
        "prune": Arm(Treatment(thresholds, grow=None)),
        "yoked": Arm(Treatment(YokedPolicy(MODELS / "p7b2/split"))),
    }
    run_phase("p7b2", arms, params)


if __name__ == "__main__":
    run(main)
