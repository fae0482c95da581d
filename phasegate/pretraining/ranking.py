"""Rank the candidates of a search by their accuracy on the gate split."""

from math import inf

import pandas as pd

from phasegate.base.errors import UserError
from phasegate.records.tables import COSTS, DECIMALS, check_numbers


def winner(search: pd.DataFrame) -> str:
    """Return the candidate with the best mean gate accuracy; ties go to fewer FLOPs, then to the first name.

    Raises:
        UserError: if no candidate finished all its trials.
    """
    best, runs = ranked(search)[0]
    if n_failed(runs):
        first = search["failure"].dropna().iloc[0]
        raise UserError(f"every candidate of the search has a failed trial, so none can be chosen; the first: {first}")
    return best


def ranked(search: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return candidates with their rows, best first; candidates with a failed trial come last."""
    keys = ["candidate", "seed"]
    check_numbers(search, [], keys)
    check_numbers(search[search["failure"].isna()], ["accuracy", *COSTS], keys)

    def merit(group: tuple[str, pd.DataFrame]) -> tuple[bool, float, float, str]:
        name, runs = group
        if n_failed(runs) == len(runs):
            return True, inf, inf, name
        return n_failed(runs) > 0, -round(runs["accuracy"].mean(), DECIMALS), runs["flops_per_example"].mean(), name

    return sorted([(str(name), runs) for name, runs in search.groupby("candidate")], key=merit)


def n_failed(runs: pd.DataFrame) -> int:
    """Count the trials of a candidate that failed."""
    return int(runs["failure"].notna().sum())
