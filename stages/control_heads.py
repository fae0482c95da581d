"""Train the control heads of phase 7b.4: one for each seed, on the surveys of all other seeds."""

from phasegate.counterfactual_head import heads
from phasegate.params import Params
from phasegate.stage import HEADS, SURVEYS, run
from phasegate.trials import run_trials


def main(params: Params) -> None:
    """Write `models/heads/seed-*/head.safetensors`."""
    run_trials(heads(SURVEYS, params.seeds), HEADS, "heads")


if __name__ == "__main__":
    run(main)
