"""Data: fetch or generate, verify, split, standardise."""

from pathlib import Path

from phasegate.params import Params
from phasegate.prepare import prepare
from phasegate.stage import PREPARED, RAW, run


def main(params: Params) -> None:
    """Write `data/prepared/`."""
    data = params.data
    path = None if data.path is None else Path(data.path)
    tasks = data.tasks.get(data.name, {})
    prepare(data.name, PREPARED, RAW, path, data.validation, data.split_seed, tasks)


if __name__ == "__main__":
    run(main)
