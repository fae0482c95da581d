"""The control arm of every 7b phase: the same steps, no control head, no surgery."""

from phasegate.params import Params
from phasegate.phase import Arm, continuations
from phasegate.stage import BASELINES, MODELS, PREPARED, run
from phasegate.trials import run_trials


def main(params: Params) -> None:
    """Fine-tune the 7a checkpoints for the 7b budget."""
    arms = [Arm("continue")]
    trials = continuations(PREPARED, BASELINES, "continue", arms, params.seeds, params.p7b)
    run_trials(trials, MODELS / "continue", "continue")


if __name__ == "__main__":
    run(main)
