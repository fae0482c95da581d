"""Phase 7a, baseline: a fixed number of routed experts, with verified checkpoints for all that follows."""

from phasegate.data import load_meta
from phasegate.model import ModelSpec
from phasegate.params import Params
from phasegate.pretraining import pretraining
from phasegate.pretraining_params import Architecture, Training
from phasegate.sections import load_section
from phasegate.stage import MODELS, PREPARED, run
from phasegate.trials import run_trials


def main(params: Params) -> None:
    """Train what the searches chose, with every seed."""
    meta = load_meta(PREPARED)
    best = MODELS / "q2.yaml"
    training = load_section(best, "training", Training)
    architecture = load_section(best, "model", Architecture)
    spec = ModelSpec(architecture, meta.input_shape, (meta.classes,))
    trials = [
        pretraining(PREPARED, "p7a", "baseline", seed, spec, training, keep_optimizer=True)
        for seed in range(params.seeds)
    ]
    run_trials(trials, MODELS / "p7a", "p7a")


if __name__ == "__main__":
    run(main)
