"""Compute statistics over seeds: intervals, the paired t-test, and Holm's correction.

All functions are pure and take one value per seed. They refuse NaN and infinities, and return no NaN, but for a
ratio that means nothing. Too few seeds give values that decide nothing: one seed has the interval (-inf, inf) and the
p-value 1.

Student's t supposes normal differences. If they are skewed by 1, more than most arms here, an interval of 95 % errs on
one side in 5 to 6 % of studies instead of 2.5 %, and on both together in 6 to 7 % instead of 5 %.
"""

from math import inf, isfinite, nan, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, stdtr, stdtrit

from phasegate.base.errors import UserError
from phasegate.records.tables import DECIMALS


def mean_interval(values: ArrayLike, confidence: float, further_error: float = 0.0) -> tuple[float, float, float]:
    """Return the mean of `values` (seeds,) and the bounds of Student's t interval; equal values are their bounds.

    `further_error` is a standard error of the mean from another source than the seeds, in the units of the values.
    """
    x = _check(values)
    mean, error = _mean_and_error(x)
    half = half_width(sqrt(error * error + further_error * further_error), len(x), confidence)
    return mean, mean - half, mean + half


def half_width(error: float, seeds: int, confidence: float) -> float:
    """Return half the width of Student's t interval of a mean over seeds with this standard error."""
    return float(stdtrit(seeds - 1, (1 + confidence) / 2)) * error if seeds > 1 else inf


def ratio_interval(numerators: ArrayLike, denominators: ArrayLike, confidence: float) -> tuple[float, float, float]:
    """Return the ratio of two means over the same seeds, (seeds,) each, with the bounds of Fieller's interval.

    They are the ratios r for which the mean of `numerators - r * denominators` is not certainly apart from zero. Where
    the mean of the denominators is not certainly above zero the ratio means nothing: NaN, between -inf and inf.
    Source: Fieller 1954, Journal of the Royal Statistical Society B 16(2).
    """
    a, b = _check(numerators), _check(denominators)
    (mean_a, error_a), (mean_b, error_b) = _mean_and_error(a), _mean_and_error(b)
    if not mean_interval(b, confidence)[1] > 0:
        return nan, -inf, inf
    t2 = float(stdtrit(len(a) - 1, (1 + confidence) / 2)) ** 2
    covariance = float(np.cov(a, b)[0, 1]) / len(a) if error_a and error_b else 0.0
    square, linear = mean_b**2 - t2 * error_b**2, mean_a * mean_b - t2 * covariance
    root = sqrt(max(linear**2 - square * (mean_a**2 - t2 * error_a**2), 0.0))
    return mean_a / mean_b, (linear - root) / square, (linear + root) / square


def share_interval(count: int, total: int, confidence: float) -> tuple[float, float, float]:
    """Return a share with the bounds of the exact binomial interval (Clopper and Pearson 1934)."""
    tail, rest = (1 - confidence) / 2, total - count
    low = float(betaincinv(count, rest + 1, tail)) if count else 0.0
    high = float(betaincinv(count + 1, rest, 1 - tail)) if rest else 1.0
    return count / total, low, high


def interval_columns(name: str, values: ArrayLike, confidence: float, further_error: float = 0.0) -> dict[str, float]:
    """Return the interval of `values` as three columns of a table; `delta_pp` has the bounds `delta_lo`, `delta_hi`."""
    return dict(zip(column_names(name), mean_interval(values, confidence, further_error), strict=True))


def bounded_columns(name: str, values: ArrayLike, confidence: float, most: float) -> dict[str, float]:
    """Return `interval_columns` of values from 0 to `most`; bounds end there, but those of one seed stay infinite."""
    columns = interval_columns(name, values, confidence)
    return {key: min(max(value, 0.0), most) if isfinite(value) else value for key, value in columns.items()}


def column_names(name: str) -> tuple[str, str, str]:
    """Return the columns of a mean and its bounds."""
    return name, f"{name.removesuffix('_pp')}_lo", f"{name.removesuffix('_pp')}_hi"


def paired_difference(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Return `a - b` seed by seed, (seeds,), without the rounding error of the subtraction."""
    return np.asarray(np.round(_check(a) - _check(b), DECIMALS), dtype=np.float64)


def margin_p_value(differences: ArrayLike, margin: float) -> float:
    """Return the p-value of the two-sided paired t-test of H0: the mean of `differences` (seeds,) is `-margin`."""
    x = _check(differences)
    mean, error = _mean_and_error(x)
    if len(x) == 1 or error == 0:  # without variance the answer is certain
        return 1.0 if len(x) == 1 or mean == -margin else 0.0
    return 2 * float(stdtr(len(x) - 1, -abs(mean + margin) / error))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Return p-values, in the order given, adjusted by Holm's (1979) step-down method for the number of tests."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def _mean_and_error(x: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean and its standard error, exact for equal values (numpy's sum would leave rounding error)."""
    if np.ptp(x) == 0:
        return float(x[0]), 0.0
    return float(x.mean()), float(x.std(ddof=1)) / sqrt(len(x))


def _check(values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise UserError(f"statistics over seeds need one value per seed, got an array of shape {x.shape}")
    if not np.isfinite(x).all():
        index = int(np.flatnonzero(~np.isfinite(x))[0])
        raise UserError(f"value {index} of {len(x)} is {x[index]}: statistics over seeds need finite numbers")
    return x
