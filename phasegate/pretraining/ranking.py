"""Race the candidates of a search by their gate accuracies: the first stays until another certainly beats it."""

from collections.abc import Callable, Mapping, Sequence
from math import inf, sqrt

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from phasegate.base.errors import UserError
from phasegate.params.pretraining import Search
from phasegate.records.tables import COSTS, DECIMALS, check_numbers

Scores = Mapping[str, Sequence[float]]
"""Gate accuracies (percent) of candidates, each with the first seeds of the search."""


def race(
    names: Sequence[str], counts: dict[str, int], measure: Callable[[Mapping[str, int]], Scores], search: Search
) -> str:
    """Return which of the candidates `names`, in the order declared, wins.

    `measure` trains as many seeds of each candidate as `counts` says, at first one, and returns the scores of those
    whose trials all finished. While others lead the incumbent by half of the gain worth finding, the first of them gets
    another seed, and the incumbent as many.

    Raises:
        UserError: if no candidate finished all its trials.
    """
    counts |= {name: counts.get(name, 1) for name in names}
    while True:
        found = measure(counts)
        scores = {name: found[name] for name in names if name in found}
        if not scores:
            raise UserError(f"each candidate of the search ({', '.join(names)}) has a failed trial: none can be chosen")
        best = incumbent(scores, search.confidence)
        rival = contender(scores, best, search)
        if rival is None:
            return best
        counts[rival] += 1
        counts[best] = max(counts[best], counts[rival])


def incumbent(scores: Scores, confidence: float) -> str:
    """Walk through the candidates and return the last that replaced the one before it.

    One replaces another if the interval of its gain, seed by seed, lies above zero. The spread over seeds is pooled
    over all candidates, which have too few seeds for a spread of their own.
    """
    best, *others = scores
    squares = sum(len(x) * float(np.var(x)) for x in scores.values())
    freedom = sum(len(x) - 1 for x in scores.values())
    if not freedom:
        return best
    half = float(stdtrit(freedom, (1 + confidence) / 2)) * sqrt(2 * squares / freedom)  # of one seed's difference
    for name in others:
        shared = min(len(scores[name]), len(scores[best]))
        gain = _lead(scores[name][:shared], scores[best][:shared])
        if shared > 1 and gain > half / sqrt(shared):
            best = name
    return best


def contender(scores: Scores, best: str, search: Search) -> str | None:
    """Return the candidate that leads the incumbent `best` most, if it may gain enough and has seeds left."""
    worth = search.gain * (100 - float(np.mean(scores[best]))) / 2
    leads = {name: _lead(x, scores[best]) for name, x in scores.items() if len(x) < search.seeds.count}
    rival = max(leads, key=lambda name: leads[name], default=best)
    return rival if rival != best and leads[rival] > worth else None


def _lead(x: Sequence[float], y: Sequence[float]) -> float:
    """Return by how much the mean of `x` is above that of `y`, without rounding error."""
    return round(float(np.mean(x) - np.mean(y)), DECIMALS)


def ranked(search: pd.DataFrame, first: Sequence[str] = ()) -> list[tuple[str, pd.DataFrame]]:
    """Return candidates with their rows: those that are `first`, then those that raced longer, then the more accurate.

    Ties go to fewer FLOPs, then to the first name. Candidates with a failed trial come last.
    """
    keys = ["candidate", "seed"]
    check_numbers(search, [], keys)
    check_numbers(search[search["failure"].isna()], ["accuracy", *COSTS], keys)

    def merit(group: tuple[str, pd.DataFrame]) -> tuple[bool, int, int, float, float, str]:
        name, runs = group
        if n_failed(runs) == len(runs):
            return True, len(first), 0, inf, inf, name
        place = first.index(name) if name in first else len(first)
        accuracy = round(runs["accuracy"].mean(), DECIMALS)
        return n_failed(runs) > 0, place, -len(runs), -accuracy, runs["flops_per_example"].mean(), name

    return sorted([(str(name), runs) for name, runs in search.groupby("candidate")], key=merit)


def n_failed(runs: pd.DataFrame) -> int:
    """Count the trials of a candidate that failed."""
    return int(runs["failure"].notna().sum())
