"""Run phase 7b.4: ground truth, the measured change of the loss, as the signal."""

from phasegate.base.paths import HEADS
from phasegate.params import Params
from phasegate.signals.ground_truth import MeasuredPolicy, PredictedPolicy
from phasegate.stage import run
from phasegate.surgery.continuation import Arm, run_phase
from phasegate.surgery.controllers import LabelPolicy
from phasegate.surgery.surgeon import Treatment


def main(params: Params) -> None:
    """Compare a head that predicts the change, measuring it, plain usage, and a head that may not act."""
    truth = params.p7b4
    worth = truth.price, truth.certainty
    measured = MeasuredPolicy(*worth, truth.candidates, truth.recovery_steps, truth.repeats, truth.every)
    arms = {
        "counterfactual_head": Arm(Treatment(PredictedPolicy(HEADS, *worth))),
        "oracle": Arm(Treatment(measured)),
        "frequency": Arm(Treatment(LabelPolicy(truth.usage))),
        "keep": Arm(Treatment(PredictedPolicy(HEADS, *worth, acts=False))),
    }
    run_phase("p7b4", arms, params)


if __name__ == "__main__":
    run(main)
