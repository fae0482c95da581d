"""Attribute an arm's difference from its start to the arm's ingredients, as a table and as text.

A part is a contrast: a weighted sum of arms, taken seed by seed, so it has an interval. It rests on the seeds that all
its arms finished. The parts of an account add up exactly to its whole if all rest on the same seeds. They are marginal
effects in the order given: another order would share out interactions differently. The factorial of signal and growth
shows how large interactions are.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from phasegate.base.errors import UserError
from phasegate.params.names import BASELINE, CONTROL, START
from phasegate.records.tables import DECIMALS
from phasegate.verdicts.decisions import paired_arms
from phasegate.verdicts.statistics import holm, interval_columns, margin_p_value
from phasegate.verdicts.wording import Cells, measure, p_text, phase_label, rows_of

Contrast = Mapping[str, float]  # "phase/arm" -> weight; the weights sum to zero

BEGUN, CONTINUED = f"{START}/{BASELINE}", f"{START}/{CONTROL}"
WHOLE = "all together"
COLUMNS = ["account", "part", "contrast", "n_seeds", "effect_pp", "effect_lo", "effect_hi", "p_value", "p_holm"]
FACTORIAL = {  # signal -> growth -> arm; the labels themselves act, and experts are pruned alike
    "random": {"split": "p7b1/random_split", "clone": "p7b1/random_clone", "reinit": "p7b1/random_acting"},
    "entropy": {"split": "p7b2/split_thresholds", "clone": "p7b2/clone_thresholds", "reinit": "p7b2/reinit_thresholds"},
}


def _minus(*arms: str) -> Contrast:
    """Return one arm minus another; for four arms, the first difference minus the second."""
    return dict(zip(arms, (1.0, -1.0, -1.0, 1.0), strict=False))


def _cross(outer: Mapping[str, float], inner: Mapping[str, float]) -> Contrast:
    """Return a contrast of the factorial: every weight of a signal times every weight of a growth, or vice versa."""
    return {
        FACTORIAL[a][b] if a in FACTORIAL else FACTORIAL[b][a]: weight * other
        for a, weight in outer.items()
        for b, other in inner.items()
    }


ENTROPY_INSTEAD = {"entropy": 1.0, "random": -1.0}
CLONES_INSTEAD, FRESH_INSTEAD = {"clone": 1.0, "split": -1.0}, {"reinit": 1.0, "split": -1.0}
ACCOUNTS: Mapping[str, Mapping[str, Contrast]] = {
    "p7b1": {
        "extra training": _minus(CONTINUED, BEGUN),
        "noise gradient in the trunk": _minus("p7b1/noise", CONTINUED),
        "splits and removals at random": _minus("p7b1/random_split", CONTINUED),
        "fresh experts instead of splits, at random": _minus("p7b1/random_acting", "p7b1/random_split"),
        "a head deciding, not the labels": _minus("p7b1/noise_acting", "p7b1/noise", "p7b1/random_acting", CONTINUED),
        WHOLE: _minus("p7b1/noise_acting", BEGUN),
    },
    "p7b2": {
        "extra training": _minus(CONTINUED, BEGUN),
        "splits and removals at random": _minus("p7b1/random_split", CONTINUED),
        "entropy instead of random labels": _minus("p7b2/split_thresholds", "p7b1/random_split"),
        "a head deciding, not the labels": _minus("p7b2/split", "p7b2/split_thresholds"),
        WHOLE: _minus("p7b2/split", BEGUN),
    },
    "factorial": {
        "entropy instead of random labels": _cross(ENTROPY_INSTEAD, dict.fromkeys(FACTORIAL["random"], 1 / 3)),
        "clones instead of splits": _cross(CLONES_INSTEAD, dict.fromkeys(FACTORIAL, 0.5)),
        "fresh experts instead of splits": _cross(FRESH_INSTEAD, dict.fromkeys(FACTORIAL, 0.5)),
        "interaction: entropy and clones": _cross(ENTROPY_INSTEAD, CLONES_INSTEAD),
        "interaction: entropy and fresh experts": _cross(ENTROPY_INSTEAD, FRESH_INSTEAD),
    },
}
"""What the arms of 7b.1 and 7b.2 lose, by part and in all; and signal by growth, each averaged over the other."""


def attribution(trials: pd.DataFrame, failures: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Return the accounts as a table: the effect of every part on test accuracy, pp, with intervals over seeds.

    P-values are of no effect; `p_holm` corrects them over the parts of an account, without its whole. A part without a
    seed that all its arms finished is blank, and counts for Holm with p = 1. Raises UserError for an arm of an account
    that neither `trials` nor `failures` have, and as `decide` does.
    """
    accuracy = {f"{phase}/{arm}": rows["accuracy"] for (phase, arm), rows in paired_arms(trials, failures).items()}
    rows = []
    for name, account in ACCOUNTS.items():
        measured = [_measure(name, part, contrast, accuracy, confidence) for part, contrast in account.items()]
        parts = [row for row in measured if row["part"] != WHOLE]
        for row, p in zip(parts, holm([row.get("p_value", 1) for row in parts]), strict=True):
            row |= {"p_holm": p} if row["n_seeds"] else {}
        rows += measured
    return pd.DataFrame(rows, columns=COLUMNS)


def _measure(
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
    return row | interval_columns("effect_pp", effects, confidence) | {"p_value": margin_p_value(effects, 0.0)}


def account_label(account: str) -> str:
    """Return the title of an account; a chain is named after the arm that it explains."""
    if WHOLE not in ACCOUNTS[account]:
        return "signal by growth"
    return f"{phase_label(account)} {next(iter(ACCOUNTS[account][WHOLE])).split('/')[1]}"


def attribution_findings(table: pd.DataFrame, confidence: float) -> list[str]:
    """Return one sentence per account, made from its rows."""
    return [f"{account_finding(table, account, confidence)}." for account in ACCOUNTS]


def account_finding(table: pd.DataFrame, account: str, confidence: float) -> str:
    """Return where an account's arm ends and which part cost it most; of the factorial, which effects are certain."""
    label, rows = account_label(account), rows_of(table[table["account"] == account])
    parts = [row for row in rows if row.part != WHOLE and row.n_seeds]
    certain = [row for row in parts if row.p_holm < 1 - confidence]
    if WHOLE not in ACCOUNTS[account]:
        effects = "; ".join(f"{row.part}, {effect(row)}" for row in certain)
        return f"{label}: {f'certain (Holm) is the effect of {effects}' if certain else 'no effect is certain (Holm)'}"
    if not rows[-1].n_seeds:
        return f"{label}: no seed finished, so no effect can be attributed"
    text = f"{label} ends {effect(rows[-1])} from its 7a checkpoint"
    worst = min(parts, key=lambda row: row.effect_pp)
    if worst.effect_pp >= 0:
        return f"{text}, and no part of it costs anything"
    doubt = "" if worst in certain else ", not certain (Holm)"
    return f"{text}; the costliest part is {worst.part}, {effect(worst)}{doubt}"


def attribution_cells(table: pd.DataFrame) -> Cells:
    """Return the parts as people read them."""
    return [
        {"account": account_label(row.account), "part": row.part, "effect, pp": measure(row, "effect_pp", signed=True)}
        | {"p": p_text(row.p_value), "p (Holm)": p_text(row.p_holm), "seeds": str(row.n_seeds)}
        | {"contrast of arms": row.contrast}
        for row in rows_of(table)
    ]


def effect(row: Any) -> str:
    """Return an effect with unit and interval, or that no seed finished all arms of the contrast."""
    return measure(row, "effect_pp", signed=True, unit="pp") if row.n_seeds else "no seed finished"
