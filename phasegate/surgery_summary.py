"""What each kind of surgery did, over all its trials: one row per phase, arm and operation.

Accuracies are in percent, differences in percentage points (pp).
"""

from math import inf
from typing import Any

import pandas as pd
from numpy.typing import ArrayLike

from phasegate.decisions import CONTROL, relabel_control
from phasegate.statistics import mean_interval, paired_difference
from phasegate.study import START

COLUMNS = [
    *("phase", "arm", "operation", "n_seeds", "surgeries", "seeds_operated", "output_change", "output_change_max"),
    *("accuracy_lost", "accuracy_lost_lo", "accuracy_lost_hi", "recovery_steps", "recovered"),
    *("delta_pp", "delta_lo", "delta_hi", "gate_delta_pp", "gate_delta_lo", "gate_delta_hi"),
    *("pairs", "balanced", "output_distance"),
    *("swap_loss", "swap_loss_lo", "swap_loss_hi"),
]
BALANCED = 0.25  # the share of tokens that each half of a split should keep of those that the two share


def surgery_summary(
    surgeries: pd.DataFrame, halves: pd.DataFrame, curves: pd.DataFrame, decisions: pd.DataFrame, confidence: float
) -> pd.DataFrame:
    """The table `reports/surgery_summary.csv`; its first row is the control, without surgery.

    Of trials that failed there is nothing to summarise; and seeds that the control failed are left out.

    Columns: n_seeds (of the arm) and seeds_operated (those with any such surgery, over which the means at once are
    taken); surgeries (count); output_change (mean, relative, at once) and output_change_max; accuracy_lost (pp of
    gate accuracy at once, mean over seeds, with bounds); recovery_steps (median, where one that never recovered
    counts as inf) and recovered (share); delta_pp with bounds (the arm's final difference from the control, on test)
    and gate_delta_pp (the same on the gate split, which is what parameters are chosen by); and for splits: pairs
    (halves that are both still there at the end), balanced (share of them in which each has at least a quarter of the
    tokens), output_distance (mean, relative), swap_loss (nats per token if the halves traded places, mean over seeds,
    with bounds).
    """
    final = _FinalDifferences(decisions, relabel_control(curves), confidence)
    surgeries, halves = (table[table["seed"].isin(final.seeds)] for table in (surgeries, halves))
    rows: list[dict[str, Any]] = [
        {"phase": START, "arm": CONTROL, "operation": "none", "surgeries": 0, "seeds_operated": 0}
        | final.of(START, CONTROL)
    ]
    for (phase, arm, operation), done in surgeries.groupby(["phase", "arm", "operation"], sort=False):
        recovery = done["recovery_steps"].astype(float)
        lost = (done["accuracy_before"] - done["accuracy_after"]).groupby(done["seed"]).mean()
        pairs = halves[(halves["phase"] == phase) & (halves["arm"] == arm)] if operation == "split" else halves.head(0)
        rows.append(
            {"phase": phase, "arm": arm, "operation": operation, "surgeries": len(done), "seeds_operated": len(lost)}
            | {"output_change": done["output_change"].mean(), "output_change_max": done["output_change"].max()}
            | _bounds("accuracy_lost", "accuracy_lost", lost, confidence)
            | {"recovery_steps": recovery.fillna(inf).median(), "recovered": recovery.notna().mean()}
            | final.of(str(phase), str(arm))
            | (_pairs(pairs, confidence) if len(pairs) else {})
        )
    return pd.DataFrame(rows, columns=COLUMNS)


class _FinalDifferences:
    """Where arms end, beside the control: on test, as decided, and on the gate split, from the curves."""

    def __init__(self, decisions: pd.DataFrame, curves: pd.DataFrame, confidence: float) -> None:
        self.decisions, self.confidence = decisions, confidence
        self.ends = curves.sort_values("step", kind="stable").groupby(["phase", "arm", "seed"])["accuracy"].last()
        self.control = self.ends[START][CONTROL]
        self.seeds = self.control.index

    def of(self, phase: str, arm: str) -> dict[str, Any]:
        """The columns of one arm."""
        row = self.decisions[(self.decisions["phase"] == phase) & (self.decisions["arm"] == arm)].iloc[0]
        test = {name: row[name] for name in ("n_seeds", "delta_pp", "delta_lo", "delta_hi")}
        ends, control = self.ends[phase][arm].align(self.control, join="inner")
        gate = paired_difference(ends, control)
        return test | _bounds("gate_delta_pp", "gate_delta", gate, self.confidence)


def _pairs(pairs: pd.DataFrame, confidence: float) -> dict[str, Any]:
    swap = pairs.groupby("seed")["swap_loss"].mean()
    return {
        "pairs": len(pairs),
        "balanced": (pairs["smaller_share"] >= BALANCED).mean(),
        "output_distance": pairs["output_distance"].mean(),
    } | _bounds("swap_loss", "swap_loss", swap, confidence)


def _bounds(mean: str, bounds: str, values: ArrayLike, confidence: float) -> dict[str, float]:
    """Mean over seeds and its interval, as three columns."""
    interval = mean_interval(values, confidence)
    return {mean: interval.mean, f"{bounds}_lo": interval.lo, f"{bounds}_hi": interval.hi}
