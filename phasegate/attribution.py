"""What broke it: an arm's difference from its start, split into what each of its ingredients does.

A part is a contrast: a weighted sum of arms, taken seed by seed, so that it has an interval as any difference has.
The parts of an account add up to its whole exactly, if all rest on the same seeds: each on those that all its arms
finished. They are marginal effects in the order given: another order would
share out interactions otherwise, so the factorial of signal and surgery says how large those are.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from phasegate.decisions import paired_arms
from phasegate.errors import UserError
from phasegate.statistics import DECIMALS, holm, margin_p_value, mean_interval
from phasegate.study import START, START_ARMS

Contrast = Mapping[str, float]  # "phase/arm" -> weight; the weights sum to zero

BEGUN, CONTINUED = (f"{START}/{arm}" for arm in START_ARMS)
WHOLE = "all together"
COLUMNS = ["account", "part", "contrast", "n_seeds", "effect_pp", "effect_lo", "effect_hi", "p_value", "p_holm"]


class Account(NamedTuple):
    """Parts in order, and for a chain the contrast that they add up to."""

    parts: Mapping[str, Contrast]
    whole: Contrast | None = None


def difference(arm: str, reference: str) -> dict[str, float]:
    """One arm minus another."""
    return {arm: 1.0, reference: -1.0}


FACTORIAL = {  # signal -> growth -> arm; the labels themselves act, and experts are pruned alike
    "random": {"split": "p7b1/random_split", "clone": "p7b1/random_clone", "reinit": "p7b1/random_acting"},
    "entropy": {"split": "p7b2/split_thresholds", "clone": "p7b2/clone_thresholds", "reinit": "p7b2/reinit_thresholds"},
}


def _mean_over_signals(growth: str) -> dict[str, float]:
    return {FACTORIAL[signal][growth]: 0.5 for signal in FACTORIAL} | {
        FACTORIAL[signal]["split"]: -0.5 for signal in FACTORIAL
    }


def _mean_over_growths() -> dict[str, float]:
    signs = {"entropy": 1 / 3, "random": -1 / 3}
    return {arm: sign for signal, sign in signs.items() for arm in FACTORIAL[signal].values()}


def _interaction(growth: str) -> dict[str, float]:
    signs = {("entropy", growth): 1.0, ("entropy", "split"): -1.0, ("random", growth): -1.0, ("random", "split"): 1.0}
    return {FACTORIAL[signal][kind]: sign for (signal, kind), sign in signs.items()}


ACCOUNTS = {
    "p7b1": Account(
        {
            "extra training": difference(CONTINUED, BEGUN),
            "noise gradient in the trunk": difference("p7b1/noise", CONTINUED),
            "splits and removals at random": difference("p7b1/random_split", CONTINUED),
            "fresh experts instead of splits, at random": difference("p7b1/random_acting", "p7b1/random_split"),
            "a head deciding, not the labels": {
                "p7b1/noise_acting": 1.0,
                "p7b1/noise": -1.0,
                "p7b1/random_acting": -1.0,
                CONTINUED: 1.0,
            },
        },
        difference("p7b1/noise_acting", BEGUN),
    ),
    "p7b2": Account(
        {
            "extra training": difference(CONTINUED, BEGUN),
            "splits and removals at random": difference("p7b1/random_split", CONTINUED),
            "entropy instead of random labels": difference("p7b2/split_thresholds", "p7b1/random_split"),
            "a head deciding, not the labels": difference("p7b2/split", "p7b2/split_thresholds"),
        },
        difference("p7b2/split", BEGUN),
    ),
    "factorial": Account(
        {
            "entropy instead of random labels": _mean_over_growths(),
            "clones instead of splits": _mean_over_signals("clone"),
            "fresh experts instead of splits": _mean_over_signals("reinit"),
            "interaction: entropy and clones": _interaction("clone"),
            "interaction: entropy and fresh experts": _interaction("reinit"),
        }
    ),
}
"""What the arms of 7b.1 and 7b.2 lose, part by part; and signal by growth, each averaged over the other."""


def attribution(trials: pd.DataFrame, confidence: float, failures: pd.DataFrame | None = None) -> pd.DataFrame:
    """The accounts as a table: effects of every part on test accuracy, pp, with intervals over seeds.

    P-values are those of no effect; `p_holm` corrects them over the parts of an account. The last row of a chain is
    its whole. A part of which no seed finished all arms is blank, and counts for Holm with p = 1. Raises UserError for
    an arm that an account needs and neither `trials` nor `failures` have, and as `decide` does.
    """
    accuracy = {f"{phase}/{arm}": rows["accuracy"] for (phase, arm), rows in paired_arms(trials, failures).items()}
    rows = []
    for name, account in ACCOUNTS.items():
        parts = [_row(name, part, contrast, accuracy, confidence) for part, contrast in account.parts.items()]
        for row, p in zip(parts, holm([row.get("p_value", 1) for row in parts]), strict=True):
            row |= {"p_holm": p} if row["n_seeds"] else {}
        rows += parts
        if account.whole:
            rows.append(_row(name, WHOLE, account.whole, accuracy, confidence))
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(
    account: str, part: str, contrast: Contrast, accuracy: Mapping[str, "pd.Series[float]"], confidence: float
) -> dict[str, Any]:
    if lacking := set(contrast) - set(accuracy):
        raise UserError(f"the account of {account} needs the arm {min(lacking)}: it has no trials")
    every = np.round(sum(weight * accuracy[arm].to_numpy() for arm, weight in contrast.items()), DECIMALS)
    effects = every[~np.isnan(every)]  # of the seeds that all arms finished
    named = " ".join(f"{weight:+.3g} {arm}" for arm, weight in contrast.items())
    row = {"account": account, "part": part, "contrast": named, "n_seeds": len(effects)}
    if not len(effects):
        return row
    mean, lo, hi = mean_interval(effects, confidence)
    return row | {
        "effect_pp": mean,
        "effect_lo": lo,
        "effect_hi": hi,
        "p_value": margin_p_value(effects, 0.0),
    }
