"""Measure, print the table and write reports/bench.json: `make bench`, or `make bench STUDY=1` with the whole study."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import phasegate  # noqa: F401, before numpy and torch

# isort: split
import pandas as pd
import torch

from bench import layer, step, study, workers
from bench.timing import Entry
from phasegate.base.errors import report_user_errors
from phasegate.base.files import write_atomic
from phasegate.base.paths import REPORTS

ROUNDS = 15


def main() -> None:
    """Measure all entries, print them, and write them to reports/bench.json."""
    rows = []
    for line in entries(whole_study="study" in sys.argv[1:]):
        threads = f"{line.threads} thread{'s' * (line.threads > 1)}"
        print(f"{line.case}, {threads}: {line.ours_ms:.2f} ms", file=sys.stderr, flush=True)
        rows.append(asdict(line))
    write_atomic(REPORTS / "bench.json", json.dumps(rows, indent=1) + "\n")
    print(pd.DataFrame(rows).to_string(index=False, na_rep=""))


def entries(whole_study: bool) -> Iterator[Entry]:
    """Measure the layer and a step with one thread and with two, then trials in two workers and the study."""
    for threads in (1, 2):
        yield from layer.entries(threads, ROUNDS)
        yield from step.entries(threads, ROUNDS)
    torch.set_num_threads(1)
    yield from workers.entries(rounds=3)
    yield from study.no_op(rounds=3)
    if whole_study:
        yield from study.whole()


if __name__ == "__main__":
    with report_user_errors("bench"):
        main()
