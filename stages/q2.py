"""Phase 7a, Q2: which MoE architecture?"""

import yaml

from phasegate.base.files import write_atomic
from phasegate.base.paths import MODELS, PREPARED
from phasegate.model.classifier import ModelSpec
from phasegate.params import Params
from phasegate.params.fields import load_section
from phasegate.params.pretraining import Training
from phasegate.pretraining.ranking import winner
from phasegate.pretraining.search import run_search, variants
from phasegate.records.prepared import load_meta
from phasegate.stage import run


def main(params: Params) -> None:
    """Search over architectures with Q1's training; the best with the baseline's number of experts goes on."""
    meta = load_meta(PREPARED)
    training = load_section(MODELS / "q1.yaml", "training", Training)
    architectures = variants(params.model, params.q2, "q2.candidates")
    candidates = {
        name: (ModelSpec(architecture, meta.input_shape, (meta.classes,)), training)
        for name, architecture in architectures.items()
    }
    folder = MODELS / "q2"
    results = run_search("q2", candidates, params.q2.candidates, params.q2.seeds.all, PREPARED, folder)
    eligible = {name for name, architecture in architectures.items() if architecture.n_routed == params.p7a.n_routed}
    best = winner(results[results["candidate"].isin(eligible)])
    content = {
        "candidate": best,
        "training": training.model_dump(),
        "model": architectures[best].model_dump(),
    }
    write_atomic(folder.with_suffix(".yaml"), yaml.safe_dump(content, sort_keys=False))


if __name__ == "__main__":
    run(main)
