"""Phase 7b.4: ground truth, the measured change of the loss, as the signal."""

from phasegate.control import LabelControl
from phasegate.ground_truth import MeasuredControl, PredictedControl
from phasegate.params import Params
from phasegate.phase import Arm, continuations
from phasegate.stage import BASELINES, HEADS, MODELS, PREPARED, run
from phasegate.surgeon import Treatment
from phasegate.trials import run_trials


def main(params: Params) -> None:
    """A head that predicts the change; measuring it; plain usage; and the head again, its hands tied."""
    truth = params.p7b4
    measuring = MeasuredControl(truth.price, truth.candidates, truth.recovery_steps, truth.repeats)
    arms = [
        Arm("counterfactual_head", Treatment(PredictedControl(HEADS, truth.price))),
        Arm("oracle", Treatment(measuring)),
        Arm("frequency", Treatment(LabelControl(truth.usage))),
        Arm("keep", Treatment(PredictedControl(HEADS, truth.price, acts=False))),
    ]
    trials = continuations(PREPARED, BASELINES, "p7b4", arms, params.seeds, params.p7b)
    run_trials(trials, MODELS / "p7b4", "p7b4")


if __name__ == "__main__":
    run(main)
