"""Train the control heads of phase 7b.4: one for each seed, on the surveys of all other seeds."""

from phasegate.base.paths import HEADS, SURVEYS
from phasegate.params import Params
from phasegate.signals.predictor import heads
from phasegate.stage import run
from phasegate.trials.run import run_trials


def main(params: Params) -> None:
    """Write `models/heads/seed-*/head.safetensors`."""
    run_trials(heads(SURVEYS, params.seeds.all), HEADS)


if __name__ == "__main__":
    run(main)
