"""Run phase 7b.4: ground truth, the measured change of the loss, as the signal."""

from phasegate.base.paths import HEADS, MODELS
from phasegate.params import Params
from phasegate.signals.ground_truth import MeasuredPolicy, PredictedPolicy
from phasegate.stage import run
from phasegate.surgery.continuation import Arm, run_phase
from phasegate.surgery.controllers import LabelPolicy, YokedPolicy
from phasegate.surgery.surgeon import Treatment


def main(params: Params) -> None:
    """Compare a head that predicts the change, measuring it, plain usage, and random choice in its place."""
    truth = params.p7b4
    worth = truth.price, truth.certainty
    measured = MeasuredPolicy(*worth, truth.candidates, truth.recovery_steps, truth.repeats, truth.every)
    arms = {
        "counterfactual_head": Arm(Treatment(PredictedPolicy(HEADS, *worth))),
        "oracle": Arm(Treatment(measured)),
        "frequency": Arm(Treatment(LabelPolicy(truth.usage))),
        "yoked": Arm(Treatment(YokedPolicy(MODELS / "p7b4/frequency"))),
    }
    run_phase("p7b4", arms, params)


if __name__ == "__main__":
    run(main)
