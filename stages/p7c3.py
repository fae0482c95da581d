"""Run phase 7c.3: some experts are dead; does ground truth find them and remove them?"""

from phasegate.base.paths import HEADS, MODELS
from phasegate.params import Params
from phasegate.signals.ground_truth import MeasuredPolicy, PredictedPolicy
from phasegate.stage import run
from phasegate.surgery.continuation import Arm, run_phase
from phasegate.surgery.controllers import InformedPolicy, LabelPolicy, Policy, YokedPolicy
from phasegate.surgery.surgeon import Treatment


def main(params: Params) -> None:
    """Compare signals that may remove experts, with the dead left, and removed by who knows them."""
    truth, dead = params.p7b4, params.p7c3.dead
    worth = truth.price, truth.certainty
    measured = MeasuredPolicy(*worth, truth.candidates, truth.recovery_steps, truth.repeats, truth.every)

    def removing(policy: Policy, dead: int = dead) -> Arm:
        return Arm(Treatment(policy, grow=None), dead=dead)

    arms = {
        "leave": Arm(dead=dead),
        "removed": removing(InformedPolicy()),
        "oracle": removing(measured),
        "counterfactual_head": removing(PredictedPolicy(HEADS, *worth)),
        "frequency": removing(LabelPolicy(truth.usage)),
        "yoked": removing(YokedPolicy(MODELS / "p7c3/oracle")),
        "sham": removing(measured, dead=0),
    }
    run_phase("p7c3", arms, params)


if __name__ == "__main__":
    run(main)
