"""Phase 7a, Q2: which MoE architecture?"""

import yaml

from phasegate.base.files import write_atomic
from phasegate.base.paths import MODELS, PREPARED
from phasegate.model.classifier import ModelSpec
from phasegate.params import Params
from phasegate.params.fields import load_section
from phasegate.params.pretraining import BASE, Training
from phasegate.params.reading import load_yaml
from phasegate.pretraining.ranking import race
from phasegate.pretraining.search import trainer
from phasegate.records.prepared import load_meta
from phasegate.records.tables import read_table
from phasegate.stage import run


def main(params: Params) -> None:
    """Search with Q1's training; the winner among architectures with the baseline's number of experts goes on.

    It then races against the others: the winner of this race is only named.
    """
    meta = load_meta(PREPARED)
    training = load_section(q1 := MODELS / "q1.yaml", "training", Training)
    architectures = params.q2.variants(params.model, "q2")
    candidates = {
        name: (ModelSpec(architecture, meta.input_shape, (meta.classes,)), training)
        for name, architecture in architectures.items()
    }
    folder = MODELS / "q2"
    known = read_table(q1.with_suffix(".csv"))
    known = known[known["candidate"] == load_yaml(q1).get("candidate")].assign(candidate=BASE)  # the same training
    counts = {BASE: max(1, known["seed"].isin(params.q2.seeds.all).sum())}
    measure = trainer("q2", candidates, params.q2, PREPARED, folder, known)
    eligible = [name for name, architecture in architectures.items() if architecture.n_routed == params.p7a.n_routed]
    best = race(eligible, counts, measure, params.q2)
    content = {
        "candidate": best,
        "winner": race([best, *(name for name in candidates if name not in eligible)], counts, measure, params.q2),
        "training": training.model_dump(),
        "model": architectures[best].model_dump(),
    }
    write_atomic(folder.with_suffix(".yaml"), yaml.safe_dump(content, sort_keys=False))


if __name__ == "__main__":
    run(main)
