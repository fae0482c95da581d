"""Train the baseline of phase 7a, with a fixed number of routed experts; later phases start from its checkpoints."""

from phasegate.base.paths import MODELS, PREPARED
from phasegate.model.classifier import ModelSpec
from phasegate.params import Params
from phasegate.params.fields import load_section
from phasegate.params.pretraining import Architecture, Training
from phasegate.pretraining.pretrain import pretraining
from phasegate.records.prepared import load_meta
from phasegate.stage import run
from phasegate.trials.run import run_trials


def main(params: Params) -> None:
    """Train what the searches chose, with every seed."""
    meta = load_meta(PREPARED)
    best = MODELS / "q2.yaml"
    training = load_section(best, "training", Training)
    architecture = load_section(best, "model", Architecture)
    spec = ModelSpec(architecture, meta.input_shape, (meta.classes,))
    trials = [
        pretraining(PREPARED, "p7a", "baseline", seed, spec, training, keep_optimizer=True) for seed in params.seeds.all
    ]
    run_trials(trials, MODELS / "p7a")


if __name__ == "__main__":
    run(main)
