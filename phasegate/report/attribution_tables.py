"""What broke it, in words: each account of `phasegate.attribution` as a sentence and as a table."""

from typing import Any

import pandas as pd

from phasegate.attribution import ACCOUNTS, WHOLE
from phasegate.report.tables import interval, p_text, phase_label, rows_of


def account_label(account: str) -> str:
    """What an account is called: that of a chain after the arm that it explains."""
    return "signal by growth" if account == "factorial" else f"{phase_label(account)} {_explained(account)}"


def attribution_findings(table: pd.DataFrame, confidence: float) -> list[str]:
    """One sentence per account, made from its rows."""
    return [f"{account_finding(table, account, confidence)}." for account in ACCOUNTS]


def account_finding(table: pd.DataFrame, account: str, confidence: float) -> str:
    """Where an account's arm ends and which part cost it most; for the factorial, which effects are certain."""
    rows = rows_of(table[table["account"] == account])
    parts = [row for row in rows if row.part != WHOLE and row.n_seeds]
    certain = [row for row in parts if row.p_holm < 1 - confidence]
    if ACCOUNTS[account].whole:
        whole = next(row for row in rows if row.part == WHOLE)
        if not whole.n_seeds:
            return f"{account_label(account)}: no seed finished, so there is nothing to share out"
        text = f"{account_label(account)} ends {effect(whole)} from its 7a checkpoint"
        worst = min(parts, key=lambda row: row.effect_pp)
        if worst.effect_pp >= 0:
            return f"{text}, and no part of it costs anything"
        return f"{text}; the costliest part is {_named(worst)}" + ("" if worst in certain else ", not certain (Holm)")
    if not certain:
        return f"{account_label(account)}: no effect is certain (Holm)"
    return f"{account_label(account)}: certain (Holm) is the effect of {'; '.join(map(_named, certain))}"


def attribution_cells(table: pd.DataFrame) -> list[dict[str, str]]:
    """The parts as people read them: one dict of column title and text per row."""
    return [
        {
            "account": account_label(row.account),
            "part": row.part,
            "effect, pp": interval(row.effect_pp, row.effect_lo, row.effect_hi, signed=True),
            "p": p_text(row.p_value),
            "p (Holm)": p_text(row.p_holm),
            "seeds": str(row.n_seeds),
            "contrast of arms": row.contrast,
        }
        for row in rows_of(table)
    ]


def effect(row: Any) -> str:
    """An effect with unit and interval; says so where no seed finished all arms of the contrast."""
    if not row.n_seeds:
        return "no seed finished"
    return interval(row.effect_pp, row.effect_lo, row.effect_hi, signed=True, unit="pp")


def _named(row: Any) -> str:
    return f"{row.part}, {effect(row)}"


def _explained(account: str) -> str:
    """The arm of a chain: the one that its whole adds."""
    whole = ACCOUNTS[account].whole or {}
    return max(whole, key=lambda arm: whole[arm]).split("/")[1]
