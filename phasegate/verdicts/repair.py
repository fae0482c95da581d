"""Count for the arms of 7c.3 which of the experts that were killed they remove, and which living ones."""

from collections.abc import Mapping
from math import inf
from typing import Any

import pandas as pd

from phasegate.params.phases import Claim, acting_in
from phasegate.verdicts.decisions import of_arm
from phasegate.verdicts.statistics import bounded_columns, column_names, share_interval

PHASE, SHAM = "p7c3", "sham"  # the phase, and the arm in which no expert is killed
COLUMNS = ["arm", "n_seeds", "dead", *column_names("found"), *column_names("false"), *column_names("false_share")]
COLUMNS += [*column_names("operations"), *column_names("acting")]
"""dead: experts of each checkpoint that were killed. found: the share of them that was removed. false: living experts
that were removed, per seed; false_share: their share of the living ones. operations: of any kind, per seed; all of
them are false alarms where nothing is dead. These intervals are over seeds, without what is impossible. acting: the
share of seeds with any operation, with the exact binomial interval. A row rests on the seeds that the arm finished."""


def repair(
    tables: Mapping[str, pd.DataFrame], claims: Mapping[str, Claim], share: float, confidence: float
) -> pd.DataFrame:
    """Return a row per arm of 7c.3 and of plugins that act there, from `trials` and `surgeries`.

    All but `sham` began with a `share` of dead ones.
    """
    rows = []
    for phase, arm in acting_in(PHASE, claims):
        trials = of_arm(tables["trials"], phase, arm).set_index("seed")
        killed = (trials["n_routed_start"] * share * (arm != SHAM)).round()
        name = arm if phase == PHASE else f"{phase}/{arm}"
        row: dict[str, Any] = {"arm": name, "n_seeds": len(trials), "dead": killed.mean()}
        if len(trials):
            done = of_arm(tables["surgeries"], phase, arm)
            done = done[done["seed"].isin(trials.index)]
            removals = done[done["n_routed_after"] < done["n_routed_before"]]
            was_dead = removals["dead"].astype(bool)

            def count(operations: pd.DataFrame, seeds: "pd.Index[Any]" = trials.index) -> "pd.Series[int]":
                return operations["seed"].value_counts().reindex(seeds, fill_value=0)

            operations, false = count(done), count(removals[~was_dead])
            living = trials["n_routed_start"] - killed
            measures = {"false": (false, inf), "false_share": (false / living, 1.0), "operations": (operations, inf)}
            if arm != SHAM:
                measures["found"] = count(removals[was_dead]) / killed, 1.0
            for measure, (values, most) in measures.items():
                row |= bounded_columns(measure, values, confidence, most)
            acting = share_interval(int((operations > 0).sum()), len(trials), confidence)
            row |= dict(zip(column_names("acting"), acting, strict=True))
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)
