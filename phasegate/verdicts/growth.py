"""Measure what growing is worth: the share of the gap between few experts and many that each arm of 7c.1 closes."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from phasegate.params.phases import Claim
from phasegate.records.tables import DECIMALS
from phasegate.verdicts.decisions import key_of, of_arm, paired_arms
from phasegate.verdicts.statistics import column_names, interval_columns, paired_difference, ratio_interval

PHASE, LARGE = "p7c1", "large"  # the phase, and the arm that has all experts from the start
COLUMNS = ["arm", "operator", "step", "factor", "n_seeds"]
COLUMNS += [*column_names("gap_closed"), *column_names("lead_pp"), *column_names("slot_ratio")]
"""operator: the way to have experts, by which the rate was chosen. step: of the growth; blank if the arm never grows.
factor: the chosen rate of expert matrices, relative to all others'. gap_closed: (arm - small) / (large - small) of mean
test accuracy; blank, without bounds, where `large` is not certainly ahead of `small`. lead_pp: the test accuracy of the
primary arm minus this arm's, paired by the seeds that both finished. slot_ratio: the expert slots that a token ran,
over all steps, relative to `small`'s."""
RATES = ["operator", "factor", "n_seeds", "chosen", *column_names("accuracy")]


def growth(tables: Mapping[str, pd.DataFrame], claims: Mapping[str, Claim], confidence: float) -> pd.DataFrame:
    """Return a row per arm of 7c.1, in the order of its claim: `COLUMNS` says what it holds.

    Of `tables` it takes `trials`, `failures`, `surgeries`, `curves` and `rates`. A row rests on the seeds that the arm,
    `small` and `large` finished.
    """
    claim, arms = claims[PHASE], paired_arms(tables["trials"], tables["failures"])
    small, large = arms[key_of(claim.control)]["accuracy"], arms[PHASE, LARGE]["accuracy"]
    primary = arms[PHASE, claim.primary]["accuracy"]
    few = _slot_steps(of_arm(tables["curves"], *key_of(claim.control)))
    chosen, rows = tables["rates"][tables["rates"]["chosen"]].groupby("operator")["factor"].first(), []
    for arm in claim.arms:
        done = pd.DataFrame({"arm": arms[PHASE, arm]["accuracy"], "small": small, "large": large}).dropna()
        operator = max((name for name in chosen.index if f"{arm}_".startswith(f"{name}_")), key=len, default=arm)
        row: dict[str, Any] = {"arm": arm, "operator": operator, "n_seeds": len(done)}
        row |= {"step": of_arm(tables["surgeries"], PHASE, arm)["step"].min(), "factor": chosen.get(operator)}
        if len(done):
            gain, gap = ((done[name] - done["small"]).round(DECIMALS) for name in ("arm", "large"))
            row |= dict(zip(column_names("gap_closed"), ratio_interval(gain, gap, confidence), strict=True))
            slots = _slot_steps(of_arm(tables["curves"], PHASE, arm))
            ratio = (slots / few).reindex(done.index).dropna()
            row |= interval_columns("slot_ratio", ratio, confidence) if len(ratio) else {}
        both = pd.DataFrame({"primary": primary, "arm": arms[PHASE, arm]["accuracy"]}).dropna()
        if len(both):
            row |= interval_columns("lead_pp", paired_difference(both["primary"], both["arm"]), confidence)
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def _slot_steps(curves: pd.DataFrame) -> "pd.Series[float]":
    """Return by seed the slots that a token ran, summed over all steps of a curve."""
    ordered = curves.sort_values(["seed", "step"])
    slots = ordered["slots"] * ordered.groupby("seed")["step"].diff()
    return slots.groupby(ordered["seed"]).sum(min_count=1)


def mean_rates(rates: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Return a row per operator and factor of the rates tried, in order: mean gate accuracy, percent, over seeds."""
    rows = []
    for (operator, factor), runs in rates.groupby(["operator", "factor"], sort=False):
        done = runs["accuracy"].dropna()
        row = {"operator": operator, "factor": factor, "n_seeds": len(done), "chosen": bool(runs["chosen"].all())}
        rows.append(row | (interval_columns("accuracy", done, confidence) if len(done) else {}))
    return pd.DataFrame(rows, columns=RATES)
