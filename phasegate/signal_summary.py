"""How good each signal is, over all seeds: one row per signal, with intervals and a test against chance.

Rank correlations have chance at 0; a regret's chance is that of the same number of experts drawn at random, seed by
seed. Regrets are in nats.
"""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from phasegate.statistics import holm, margin_p_value, mean_interval, paired_difference

CORRELATIONS = ("spearman_prune", "spearman_recovered", "spearman_grow")
GONE = (1, 2, 4)
REGRETS = tuple(f"regret_{gone}" for gone in GONE)
COLUMNS = [
    *("signal", "n_seeds", "seconds"),
    *(f"{name}{part}" for name in (*CORRELATIONS, *REGRETS) for part in ("", "_lo", "_hi")),
    *(f"saved_{gone}{part}" for gone in GONE for part in ("", "_lo", "_hi")),
    *(f"chance_{gone}" for gone in GONE),
    *(f"p_{name}" for name in (*CORRELATIONS, *REGRETS)),
]
"""saved_k: by how much the regret lies below chance, paired by seed. p_*: of a two-sided t-test of no difference from
chance, Holm-corrected over the signals that say something of the kind, the control among them. Blank: says nothing."""


def signal_summary(signals: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """The table `reports/signal_summary.csv` from `signals.csv`, in its order of signals."""
    rows = []
    for signal, runs in signals.groupby("signal", sort=False):
        row: dict[str, Any] = {"signal": signal, "n_seeds": len(runs), "seconds": runs["seconds"].mean()}
        for name in CORRELATIONS:
            row |= _measure(name, runs[name], confidence) | _p_value(name, runs[name])
        for gone in GONE:
            regret, chance = runs[f"regret_{gone}"], runs[f"chance_{gone}"]
            row[f"chance_{gone}"] = chance.mean()
            if regret.notna().all():
                saved = paired_difference(chance, regret)
                row |= _measure(f"regret_{gone}", regret, confidence) | _measure(f"saved_{gone}", saved, confidence)
                row |= _p_value(f"regret_{gone}", saved)
        rows.append(row)
    table = pd.DataFrame(rows, columns=COLUMNS)
    for name in (*CORRELATIONS, *REGRETS):
        known = table[f"p_{name}"].notna()
        table.loc[known, f"p_{name}"] = holm(table.loc[known, f"p_{name}"])
    return table


def beats_chance(row: Any, name: str, confidence: float) -> bool:
    """Whether a signal's row says that it is better than chance in a measure of `CORRELATIONS` or `REGRETS`."""
    better = getattr(row, name.replace("regret", "saved")) > 0
    return bool(better and getattr(row, f"p_{name}") < 1 - confidence)


def _measure(name: str, values: Iterable[float], confidence: float) -> dict[str, float]:
    """A mean and its bounds; nothing where a value is blank."""
    values = list(values)
    if any(map(pd.isna, values)):
        return {}
    mean, lo, hi = mean_interval(values, confidence)
    return {name: mean, f"{name}_lo": lo, f"{name}_hi": hi}


def _p_value(name: str, values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {} if any(map(pd.isna, values)) else {f"p_{name}": margin_p_value(values, 0)}
