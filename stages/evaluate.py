"""Evaluate one phase's checkpoints on the test split: `python -m stages.evaluate p7b2`."""

import argparse

from phasegate.evaluation import evaluate_phase
from phasegate.params import Params
from phasegate.stage import EVALUATED, MODELS, PREPARED, run
from phasegate.study import EVALUATED_PHASES, OWN


def main(params: Params) -> None:
    """Write the tables and predictions of the phase named on the command line."""
    parser = argparse.ArgumentParser(description="Evaluate one phase on the test split.")
    parser.add_argument("phase", choices=EVALUATED_PHASES)
    phase = parser.parse_args().phase
    evaluate_phase(MODELS / phase, PREPARED, EVALUATED / phase, may_be_empty=phase == OWN and not params.own.arms)


if __name__ == "__main__":
    run(main)
