"""Run phase 7b.1: a control head trained on random labels."""

from phasegate.params import Params
from phasegate.stage import run
from phasegate.surgery.continuation import Arm, run_phase
from phasegate.surgery.controllers import HeadPolicy, LabelPolicy
from phasegate.surgery.surgeon import Treatment


def main(params: Params) -> None:
    """Separate the noise in the labels, its gradient in the trunk, and each kind of surgery."""
    labels = params.p7b1
    arms = {
        "noise_acting": Arm(Treatment(HeadPolicy(labels, acts="sample", detach=False), grow="reinit")),
        "noise": Arm(Treatment(HeadPolicy(labels, acts="never", detach=False))),
        "noise_detached": Arm(Treatment(HeadPolicy(labels, acts="never"))),
        "random_acting": Arm(Treatment(LabelPolicy(labels), grow="reinit")),
        "random_split": Arm(Treatment(LabelPolicy(labels), grow="split")),
        "random_clone": Arm(Treatment(LabelPolicy(labels), grow="clone")),
    }
    run_phase("p7b1", arms, params)


if __name__ == "__main__":
    run(main)
