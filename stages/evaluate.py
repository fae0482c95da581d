"""Evaluate one phase's checkpoints on the test split: `python -m stages.evaluate p7b2`."""

import sys

from phasegate.evaluation import evaluate_phase
from phasegate.params import Params
from phasegate.stage import EVALUATED, MODELS, PREPARED, run


def main(params: Params) -> None:
    """Write the tables and predictions of the phase named on the command line."""
    phase = sys.argv[1]
    evaluate_phase(MODELS / phase, PREPARED, EVALUATED / phase)


if __name__ == "__main__":
    run(main)
