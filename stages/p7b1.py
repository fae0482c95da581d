"""Run phase 7b.1: a control head trained on random labels."""

from phasegate.base.paths import MODELS
from phasegate.params import Params
from phasegate.stage import run
from phasegate.surgery.continuation import Arm, run_phase
from phasegate.surgery.controllers import HeadPolicy, LabelPolicy, YokedPolicy
from phasegate.surgery.surgeon import Treatment


def main(params: Params) -> None:
    """Separate the noise in the trunk, adding and removing alone, and what choosing the experts is worth."""
    head, labels = HeadPolicy(params.p7b1, acts="sample", detach=False), LabelPolicy(params.p7b1)
    arms = {
        "noise_acting": Arm(Treatment(head, grow="reinit")),
        "noise": Arm(Treatment(head, grow=None, prune=None)),
        "random_acting": Arm(Treatment(labels, grow="reinit")),
        "grow": Arm(Treatment(labels, prune=None)),
        "prune": Arm(Treatment(labels, grow=None)),
        "yoked": Arm(Treatment(YokedPolicy(MODELS / "p7b1/noise_acting"), grow="reinit")),
    }
    run_phase("p7b1", arms, params)


if __name__ == "__main__":
    run(main)
