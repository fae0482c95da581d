"""Compare the arms of 7c.2 on all classes, on those that were there from the start, and on those that arrived."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from phasegate.params.phases import Claim, acting_in
from phasegate.records.prepared import Array
from phasegate.verdicts.statistics import column_names, interval_columns, paired_difference

PHASE, TOLD = "p7c2", "informed"  # the phase, and the arm that is told when to grow
NEAR_PP = 1.0  # by no more than this should the primary arm be worse than `TOLD`: written before the run, no verdict
COLUMNS = ["arm", "classes", "n_seeds", *column_names("accuracy"), *column_names("delta_pp"), "worst_delta"]
COLUMNS += column_names("lead_pp")
"""classes: all | old | new. accuracy: on the test examples of these classes, percent. delta_pp: the arm minus its
control, paired by seed. A row rests on the seeds that both finished. lead_pp: the primary arm minus this arm, paired by
the seeds that these two finished."""


def arrival(
    labels: Array, predictions: Mapping[str, Array], claims: Mapping[str, Claim], old: int, confidence: float
) -> pd.DataFrame:
    """Return three rows per arm of 7c.2 and of plugins that act there, from labels (N,) and predictions of trials (N,).

    Trials are named as in `p7c2/stay/seed-3`. The first `old` classes are there from the start. A part without test
    examples has no row.
    """
    parts = {"all": labels >= 0, "old": labels < old, "new": labels >= old}
    right: dict[str, dict[str, Array]] = {}
    for name, predicted in predictions.items():
        arm, _, seed = name.rpartition("/")
        right.setdefault(arm, {})[seed] = predicted == labels
    rows = []
    for phase, arm in acting_in(PHASE, claims):
        found, control = right.get(f"{phase}/{arm}", {}), right.get(claims[phase].control_of(arm), {})
        primary = right.get(f"{PHASE}/{claims[PHASE].primary}", {})
        for part, examples in parts.items():
            if not examples.any():
                continue
            accuracy, other = _accuracies(found, control, examples)
            ahead, behind = _accuracies(primary, found, examples)
            name = arm if phase == PHASE else f"{phase}/{arm}"
            row: dict[str, Any] = {"arm": name, "classes": part, "n_seeds": len(accuracy)}
            if len(accuracy):
                deltas = paired_difference(accuracy, other)
                row |= interval_columns("accuracy", accuracy, confidence) | {"worst_delta": deltas.min()}
                row |= interval_columns("delta_pp", deltas, confidence)
            if len(ahead):
                row |= interval_columns("lead_pp", paired_difference(ahead, behind), confidence)
            rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def _accuracies(one: dict[str, Array], other: dict[str, Array], examples: Array) -> tuple[Array, Array]:
    """Return the accuracies of two arms, percent, on some examples in the seeds that both finished, (seeds,) each."""
    seeds = sorted(one.keys() & other.keys())
    first, second = (np.array([100 * trials[seed][examples].mean() for seed in seeds]) for trials in (one, other))
    return first, second
