"""Phase 7a, Q1: which training configuration?"""

import yaml

from phasegate.base.files import write_atomic
from phasegate.base.paths import MODELS, PREPARED
from phasegate.model.classifier import ModelSpec
from phasegate.params import Params
from phasegate.pretraining.ranking import race
from phasegate.pretraining.search import trainer
from phasegate.records.prepared import load_meta
from phasegate.stage import run


def main(params: Params) -> None:
    """Search over training configurations on the base architecture."""
    meta = load_meta(PREPARED)
    spec = ModelSpec(params.model, meta.input_shape, (meta.classes,))
    trainings = params.q1.variants(params.training, "q1")
    candidates = {name: (spec, training) for name, training in trainings.items()}
    folder = MODELS / "q1"
    best = race([*candidates], {}, trainer("q1", candidates, params.q1, PREPARED, folder), params.q1)
    content = {"candidate": best, "training": trainings[best].model_dump()}
    write_atomic(folder.with_suffix(".yaml"), yaml.safe_dump(content, sort_keys=False))


if __name__ == "__main__":
    run(main)
