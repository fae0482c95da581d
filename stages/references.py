"""Train published models by our loop, to see that the loop is sound."""

from phasegate.base.paths import MODELS, PREPARED
from phasegate.model.references import ReferenceSpec
from phasegate.params import Params
from phasegate.pretraining.search import run_search
from phasegate.records.prepared import load_meta
from phasegate.stage import run


def main(params: Params) -> None:
    """Train each reference of this data set with every seed."""
    meta = load_meta(PREPARED)
    candidates = {
        name: (ReferenceSpec(meta.input_shape, meta.classes, model.hidden, model.channels), model.training())
        for name, model in params.references_of(meta.name).items()
    }
    seeds = dict.fromkeys(candidates, params.seeds.all)
    run_search("references", candidates, {}, seeds, PREPARED, MODELS / "references")


if __name__ == "__main__":
    run(main)
