"""Prepare the data: fetch or generate, verify, split, standardise."""

from phasegate.base.errors import UserError, visible
from phasegate.base.paths import PREPARED
from phasegate.data_sets.prepare import prepare
from phasegate.params import Params
from phasegate.params.check import refuse_too_large
from phasegate.records.prepared import load_meta
from phasegate.stage import run


def main(params: Params) -> None:
    """Write `data/prepared/`, and refuse what does not suit such data: large models, and classes that can't arrive."""
    data = params.data
    tasks = data.tasks.get(data.name, {})
    given = (data.validation, data.split_seed, tasks, data.layout)
    for remark in prepare(data.name, PREPARED, data.source, *given):
        print(visible(remark))
    meta = load_meta(PREPARED)
    refuse_too_large(params, meta.input_shape, meta.classes, meta.splits["train"])
    if params.p7c2.classes >= meta.classes:
        raise UserError(
            f"p7c2.classes is {params.p7c2.classes}, and {data.name} has {meta.classes}: it must be lower, since the "
            "other classes arrive later"
        )


if __name__ == "__main__":
    run(main)
