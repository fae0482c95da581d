"""Prepare the data: fetch or generate, verify, split, standardise."""

from phasegate.base.paths import PREPARED
from phasegate.data_sets.prepare import prepare
from phasegate.params import Params
from phasegate.params.check import refuse_too_large
from phasegate.records.prepared import load_meta
from phasegate.stage import run


def main(params: Params) -> None:
    """Write `data/prepared/`, and refuse models that are too large for such data."""
    data = params.data
    tasks = data.tasks.get(data.name, {})
    given = (data.validation, data.split_seed, tasks, data.layout)
    for remark in prepare(data.name, PREPARED, data.source, *given):
        print(remark)
    meta = load_meta(PREPARED)
    refuse_too_large(params, meta.input_shape, meta.classes)


if __name__ == "__main__":
    run(main)
