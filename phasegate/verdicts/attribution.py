"""Attribute what the arms of 7b.1 and 7b.2 lose to adding experts and to removing them, as a table and as text.

A part is a contrast: a weighted sum of arms, taken seed by seed, so it has an interval. It rests on the seeds that all
its arms finished. Arms do not operate equally often, so the same contrast is taken of the experts that were added and
of the families that were removed whole: half of a split expert leaves the router as it is, and no family.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd

from phasegate.base.errors import UserError
from phasegate.params.names import CONTINUED
from phasegate.records.tables import DECIMALS
from phasegate.verdicts.decisions import of_arm, paired_arms
from phasegate.verdicts.statistics import column_names, holm, interval_columns, margin_p_value
from phasegate.verdicts.wording import Cells, measure, number, p_text, phase_label, rows_of

Contrast = Mapping[str, float]  # "phase/arm" -> weight; the weights sum to zero

ADDING, REMOVING, BOTH, CHOOSING = "adding alone", "removing alone", "both", "choosing the experts"
COUNTS = ["added", "removed"]
COLUMNS = ["account", "part", "contrast", "n_seeds", *COUNTS, *column_names("effect_pp")]
COLUMNS += ["p_value", "p_holm", *column_names("each_pp")]
"""added: experts; removed: whole families: the contrast of their numbers, means over seeds. effect_pp: on test
accuracy. p_value: of no effect; p_holm: corrected over the parts of the account. each_pp: the effect divided by the
number of operations, over the seeds that had any, where an arm does one kind alone."""


def _minus(*arms: str) -> Contrast:
    """Return one arm minus another; for four arms, the first difference minus the second."""
    return dict(zip(arms, (1.0, -1.0, -1.0, 1.0), strict=False))


ACCOUNTS: Mapping[str, Mapping[str, Contrast]] = {
    "p7b1": {
        ADDING: _minus("p7b1/grow", CONTINUED),
        REMOVING: _minus("p7b1/prune", CONTINUED),
        BOTH: _minus("p7b1/random_acting", CONTINUED),
        "the gradient of noise": _minus("p7b1/noise", CONTINUED),
        "a head deciding, not the labels": _minus("p7b1/noise_acting", "p7b1/noise", "p7b1/random_acting", CONTINUED),
        CHOOSING: _minus("p7b1/noise_acting", "p7b1/noise", "p7b1/yoked", CONTINUED),
    },
    "p7b2": {
        ADDING: _minus("p7b2/grow", CONTINUED),
        REMOVING: _minus("p7b2/prune", CONTINUED),
        BOTH: _minus("p7b2/split", CONTINUED),
        CHOOSING: _minus("p7b2/split", "p7b2/yoked"),
    },
    "p7b4": {CHOOSING: _minus("p7b4/frequency", "p7b4/yoked")},
}
"""What each phase's adding, removing, both and choice of experts do to the accuracy."""
HARM = {
    (): "neither does certain harm",
    (ADDING,): "adding, by splits, does the harm, and removing none that is certain",
    (REMOVING,): "removing does the harm, and adding, by splits, none that is certain",
    (ADDING, REMOVING): "adding and removing both do harm",
}
SIGNALS = {"p7b1": "random labels", "p7b2": "routing entropy", "p7b4": "usage"}


def attribution(
    trials: pd.DataFrame, failures: pd.DataFrame, surgeries: pd.DataFrame, confidence: float
) -> pd.DataFrame:
    """Return the accounts as a table, a row per part: `COLUMNS` says what it holds.

    A part without a seed that all its arms finished is blank, and counts for Holm with p = 1. Raises UserError for an
    arm of an account that neither `trials` nor `failures` have, and as `decide` does.
    """
    named = {arm for account in ACCOUNTS.values() for contrast in account.values() for arm in contrast}
    arms = {
        f"{phase}/{arm}": rows.join(_count(of_arm(surgeries, phase, arm))).fillna(dict.fromkeys(COUNTS, 0))
        for (phase, arm), rows in paired_arms(trials, failures).items()
        if f"{phase}/{arm}" in named
    }
    rows = []
    for name, account in ACCOUNTS.items():
        measured = [_measure(name, part, contrast, arms, confidence) for part, contrast in account.items()]
        for row, p in zip(measured, holm([row.get("p_value", 1) for row in measured]), strict=True):
            row |= {"p_holm": p} if row["n_seeds"] else {}
        rows += measured
    return pd.DataFrame(rows, columns=COLUMNS)


def _count(log: pd.DataFrame) -> pd.DataFrame:
    """Count in an arm's log of surgeries the experts added and the families removed whole, by seed."""
    counts = {}
    for seed, rows in log.groupby("seed"):
        families, more = dict[tuple[Any, Any], tuple[Any, Any]](), Counter[tuple[Any, Any]]()
        added = removed = 0
        for row in rows_of(rows):
            expert = row.block, row.parent if row.operation == "split" else row.expert
            family = families.get(expert, expert)  # named after its first expert; others are split off
            if row.operation == "split":
                families[row.block, row.expert] = family
                more[family] += 1
            elif row.n_routed_after < row.n_routed_before:
                removed += not more[family]
                more[family] -= more[family] > 0
            added += row.n_routed_after > row.n_routed_before
        counts[seed] = added, removed
    return pd.DataFrame.from_dict(counts, orient="index", columns=COUNTS, dtype=float)


def _measure(
    account: str, part: str, contrast: Contrast, arms: Mapping[str, pd.DataFrame], confidence: float
) -> dict[str, Any]:
    if lacking := set(contrast) - set(arms):
        raise UserError(f"the account of {account} needs the arm {min(lacking)}: it has no trials")
    weighted = pd.concat(weight * arms[arm][["accuracy", *COUNTS]] for arm, weight in contrast.items())
    seeds = weighted.groupby(level=0).sum(min_count=len(contrast)).dropna().round(DECIMALS)  # that all arms finished
    named = " ".join(f"{weight:+.3g} {arm}" for arm, weight in contrast.items())
    row = {"account": account, "part": part, "contrast": named, "n_seeds": len(seeds)}
    if seeds.empty:
        return row
    row |= dict(seeds[COUNTS].mean()) | interval_columns("effect_pp", seeds["accuracy"], confidence)
    operations = seeds[COUNTS].sum(axis=1)
    if part in (ADDING, REMOVING) and operations.any():
        row |= interval_columns("each_pp", (seeds["accuracy"] / operations)[operations > 0], confidence)
    return row | {"p_value": margin_p_value(seeds["accuracy"], 0.0)}


def account_label(account: str) -> str:
    """Return the title of an account: its phase and signal."""
    return f"{phase_label(account)}, {SIGNALS[account]}"


def attribution_findings(table: pd.DataFrame, confidence: float) -> list[str]:
    """Return one sentence per account, made from its rows."""
    return [f"{account_finding(table, account, confidence)}." for account in ACCOUNTS]


def account_finding(table: pd.DataFrame, account: str, confidence: float) -> str:
    """Return what adding, removing and both do, which of them does certain harm, and what the choice is worth."""
    rows = {row.part: row for row in rows_of(table[table["account"] == account])}
    said = [f"{part}, {effect(rows[part])}{_counted(rows[part])}" for part in (ADDING, REMOVING, BOTH) if part in rows]
    said += [harm(table, account, confidence)] if said else []
    choice = rows[CHOOSING]
    doubt = "" if choice.p_holm < 1 - confidence else ", not certain (Holm)"
    said.append(f"{CHOOSING} and not drawing them, {effect(choice)}{_counted(choice)}{doubt if choice.n_seeds else ''}")
    return f"{account_label(account)}: {'; '.join(said)}"


def harm(table: pd.DataFrame, account: str, confidence: float) -> str:
    """Return which of adding and removing does certain harm."""
    rows = rows_of(table[table["account"] == account])
    harmful = {row.part for row in rows if row.effect_pp < 0 and row.p_holm < 1 - confidence}
    return HARM[tuple(part for part in (ADDING, REMOVING) if part in harmful)]


def _counted(row: Any) -> str:
    """Return ` by 7.9 added experts (-0.01 pp [-0.02, 0.00] each)`; of a choice, how the counts differ."""
    if not row.n_seeds:
        return ""
    counts, each = {"added experts": row.added, "whole families removed": row.removed}, measure(row, "each_pp", 2, True)
    told = [f"{number(n, 1, row.part == CHOOSING)} {what}" for what, n in counts.items() if abs(n) >= 0.05]
    return f" by {' and '.join(told)}{f' ({each} pp each)' if each else ''}" if told else ""


def attribution_cells(table: pd.DataFrame) -> Cells:
    """Return the parts as people read them."""
    return [
        {"account": account_label(row.account), "part": row.part, "effect, pp": measure(row, "effect_pp", signed=True)}
        | {"p": p_text(row.p_value), "p (Holm)": p_text(row.p_holm), "seeds": str(row.n_seeds)}
        | {"experts added": number(row.added, 1), "families removed": number(row.removed, 1)}
        | {"each, pp": measure(row, "each_pp", signed=True), "contrast of arms": row.contrast}
        for row in rows_of(table)
    ]


def effect(row: Any) -> str:
    """Return an effect with unit and interval, or that no seed finished all arms of the contrast."""
    return measure(row, "effect_pp", signed=True, unit="pp") if row.n_seeds else "no seed finished"
