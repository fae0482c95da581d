"""Train published models by our loop, to see that the loop is sound."""

from phasegate.base.paths import MODELS, PREPARED
from phasegate.model.references import ReferenceSpec
from phasegate.params import Params
from phasegate.pretraining.search import run_search
from phasegate.records.prepared import load_meta
from phasegate.records.tables import write_table
from phasegate.stage import run


def main(params: Params) -> None:
    """Train each reference of this data set with every seed, and note the accuracy that was published."""
    meta = load_meta(PREPARED)
    references = params.references.get(meta.name, params.references["default"])
    candidates = {
        name: (ReferenceSpec(meta.input_shape, meta.classes, model.hidden, model.channels), model.training())
        for name, model in references.items()
    }
    seeds = dict.fromkeys(candidates, params.seeds.all)
    table = run_search("references", candidates, {}, seeds, PREPARED, MODELS / "references")
    published = table["candidate"].map({name: model.published for name, model in references.items()}).astype(float)
    write_table(MODELS / "references.csv", table.assign(published_accuracy=published), digits=None)


if __name__ == "__main__":
    run(main)
