"""Measure, print the table and write reports/bench.json: `make bench`."""

import json
import sys

import pandas as pd
import torch

from bench import layer, step, workers
from bench.timing import as_row
from phasegate.files import write_atomic
from phasegate.stage import REPORTS

ROUNDS = 15


def main() -> None:
    """All cases with one thread, then with two."""
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for line in (*layer.entries(threads, ROUNDS), *step.entries(threads, ROUNDS)):
            print(
                f"{line.case}, {threads} thread{'s' * (threads > 1)}: {line.ours_ms:.2f} ms",
                file=sys.stderr,
                flush=True,
            )
            rows.append(as_row(line))
    torch.set_num_threads(1)
    rows += [as_row(line) for line in workers.entries(rounds=3)]
    write_atomic(REPORTS / "bench.json", json.dumps(rows, indent=1) + "\n")
    print(pd.DataFrame(rows).to_string(index=False, na_rep=""))


if __name__ == "__main__":
    main()
