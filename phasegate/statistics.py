"""Statistics over seeds: intervals, the paired test against the margin, Holm's correction, power.

Pure functions on arrays with one value per seed; nothing here draws random numbers. NaN and infinities are
refused, and no function returns NaN. What too few seeds can't tell is said in values that never decide
anything: one seed has the interval (-inf, inf) and the p-value 1.
"""

from bisect import bisect_left
from math import inf, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from phasegate.errors import UserError

MOST_SEEDS = 100_000  # more seeds than this is no advice
DECIMALS = 9  # accuracies are counts/N * 100: what differs beyond this is rounding error, not variance


class Interval(NamedTuple):
    """A mean over seeds and the bounds of its confidence interval, all in the unit of the values."""

    mean: float
    lo: float
    hi: float


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean of `values` (seeds,) with Student's t interval.

    Equal values give the point itself; one value gives (-inf, inf). Raises UserError for no values, NaN and
    inf.
    """
    x = _checked(values)
    _check_probability("confidence", confidence)
    if len(x) == 1:
        return Interval(float(x[0]), -inf, inf)
    mean, error = _mean_and_error(x)
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def paired_difference(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """`a - b` seed by seed, (seeds,), without the rounding error of the subtraction.

    Raises UserError if the two don't have the same number of values.
    """
    x, y = _checked(a), _checked(b)
    if len(x) != len(y):
        raise UserError(f"a paired difference needs one value per seed on both sides, got {len(x)} and {len(y)}")
    return np.asarray(np.round(x - y, DECIMALS), dtype=np.float64)


def margin_p_value(differences: ArrayLike, margin: float) -> float:
    """Two-sided paired t-test of H0: the mean of `differences` (seeds,) is `-margin`.

    Without variance the answer is certain: 1 if the mean is `-margin`, else 0. One seed tells nothing: 1.
    """
    x = _checked(differences)
    if len(x) == 1:
        return 1.0
    mean, error = _mean_and_error(x)
    if error == 0:
        return 1.0 if mean == -margin else 0.0
    return float(2 * stats.t.sf(abs(mean + margin) / error, len(x) - 1))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's (1979) step-down adjusted p-values, in the order given; comparing them with alpha bounds the
    probability of any false rejection by alpha."""
    p = np.asarray(p_values, dtype=np.float64)
    if not np.all((p >= 0) & (p <= 1)):
        raise UserError(f"p-values lie between 0 and 1, got {p.tolist()}")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def seeds_needed(mean: float, sd: float, margin: float, power: float = 0.8, confidence: float = 0.95) -> int | None:
    """Smallest number of seeds at which the two-sided t-test against `-margin` has the wished power.

    `mean` and `sd` are those of the paired differences, taken for the true ones (noncentral t). None if no
    number up to `MOST_SEEDS` suffices, which includes a mean of exactly `-margin`.
    """
    _checked([mean, sd, margin])
    _check_probability("power", power)
    _check_probability("confidence", confidence)
    distance = abs(mean + margin)
    if distance == 0:
        return None
    effect = min(distance / sd, 1e3) if sd > 0 else 1e3  # beyond this two seeds suffice; keeps nct in its range

    def power_of(n: int) -> float:
        critical, shift = stats.t.ppf((1 + confidence) / 2, n - 1), effect * sqrt(n)
        lower = np.nan_to_num(stats.nct.cdf(-critical, n - 1, shift))  # scipy says NaN where it is next to nothing
        return float(stats.nct.sf(critical, n - 1, shift) + lower)

    candidates = range(2, MOST_SEEDS + 1)  # power rises with the number of seeds
    index = bisect_left(candidates, power, key=power_of)
    return candidates[index] if index < len(candidates) else None


def _mean_and_error(x: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and its standard error, exact for equal values (numpy's sum would leave rounding error)."""
    if np.ptp(x) == 0:
        return float(x[0]), 0.0
    return float(x.mean()), float(x.std(ddof=1)) / sqrt(len(x))


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise UserError(f"statistics over seeds need one value per seed, got an array of shape {x.shape}")
    if not np.isfinite(x).all():
        index = int(np.flatnonzero(~np.isfinite(x))[0])
        raise UserError(f"value {index} of {len(x)} is {x[index]}: statistics over seeds need finite numbers")
    return x


def _check_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise UserError(f"{name} is {value}: it must lie between 0 and 1")
