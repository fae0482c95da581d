"""Evaluate one phase's checkpoints on the test split: `python -m stages.evaluate p7b2`."""

import argparse

from phasegate.base.paths import EVALUATED, MODELS, PREPARED
from phasegate.evaluation.evaluate import evaluate_phase
from phasegate.params import Params
from phasegate.params.names import EVALUATED as FOLDERS
from phasegate.params.names import PLUGINS
from phasegate.stage import run


def main(params: Params) -> None:
    """Write the tables and predictions of the phase named on the command line."""
    parser = argparse.ArgumentParser(description="Evaluate one phase on the test split.")
    parser.add_argument("phase", choices=FOLDERS)
    phase = parser.parse_args().phase
    evaluate_phase(MODELS / phase, PREPARED, EVALUATED / phase, may_be_empty=phase == PLUGINS)


if __name__ == "__main__":
    run(main)
