"""Prepare the data: fetch or generate, verify, split, standardise."""

from pathlib import Path

from phasegate.base.paths import PREPARED
from phasegate.data_sets.prepare import prepare
from phasegate.params import Params
from phasegate.stage import run


def main(params: Params) -> None:
    """Write `data/prepared/`."""
    data = params.data
    tasks = data.tasks.get(data.name, {})
    prepare(data.name, PREPARED, Path(data.path), data.validation, data.split_seed, tasks)


if __name__ == "__main__":
    run(main)
