"""Compare the arms of 7c.2 on the classes that were there from the start, and on those that arrived."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from phasegate.params.phases import Claim
from phasegate.records.prepared import Array
from phasegate.verdicts.statistics import column_names, interval_columns, paired_difference

PHASE = "p7c2"
COLUMNS = ["arm", "classes", "n_seeds", *column_names("accuracy"), *column_names("delta_pp"), "worst_delta"]
"""classes: old | new. accuracy: on the test examples of these classes, percent. delta_pp: the arm minus its control,
paired by seed. A row rests on the seeds that both finished."""


def arrival(
    labels: Array, predictions: Mapping[str, Array], claims: Mapping[str, Claim], old: int, confidence: float
) -> pd.DataFrame:
    """Return two rows per arm of 7c.2, from the labels (N,) and what each of its trials predicts (N,).

    Trials are named as in `p7c2/stay/seed-3`. The first `old` classes are there from the start. A part without test
    examples has no row.
    """
    parts = {"old": labels < old, "new": labels >= old}
    right: dict[str, dict[str, Array]] = {}
    for name, predicted in predictions.items():
        arm, _, seed = name.rpartition("/")
        right.setdefault(arm, {})[seed] = predicted == labels
    rows = []
    for arm in claims[PHASE].arms:
        found, control = right.get(f"{PHASE}/{arm}", {}), right.get(claims[PHASE].control_of(arm), {})
        seeds = sorted(found.keys() & control.keys())
        for part, examples in parts.items():
            if not examples.any():
                continue
            row: dict[str, Any] = {"arm": arm, "classes": part, "n_seeds": len(seeds)}
            if seeds:
                accuracy, other = (
                    np.array([100 * trials[seed][examples].mean() for seed in seeds]) for trials in (found, control)
                )
                deltas = paired_difference(accuracy, other)
                row |= interval_columns("accuracy", accuracy, confidence) | {"worst_delta": deltas.min()}
                row |= interval_columns("delta_pp", deltas, confidence)
            rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)
