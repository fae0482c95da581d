"""The statistics keep their promises: coverage, correction, power, and no silent NaN."""

from functools import partial
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from phasegate.base.errors import UserError
from phasegate.verdicts import statistics
from phasegate.verdicts.statistics import holm, margin_p_value, paired_difference

VALUES = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=12)
mean_interval = partial(statistics.mean_interval, confidence=0.95)
seeds_needed = partial(statistics.seeds_needed, confidence=0.95)


def decided(studies: NDArray[np.float64], margin: float) -> float:
    """The share of studies (rows of paired differences) whose interval says GO or NO-GO."""
    return float(np.mean([lo >= -margin or hi < -margin for _, lo, hi in map(mean_interval, studies)]))


@pytest.mark.parametrize("seeds", [5, 10, 20])
def test_intervals_cover_the_mean_and_p_values_are_uniform_at_the_margin(seeds: int) -> None:
    studies = np.random.default_rng(seeds).normal(3, 2, size=(4000, seeds))
    covered = np.mean([lo <= 3 <= hi for _, lo, hi in map(mean_interval, studies)])
    assert abs(covered - 0.95) < 3 * np.sqrt(0.95 * 0.05 / 4000)
    studies = np.random.default_rng(seeds).normal(-1, 0.7, size=(2000, seeds))
    assert stats.kstest([margin_p_value(study, 1.0) for study in studies], "uniform").pvalue > 0.01


@given(VALUES, st.floats(0, 10))
def test_the_test_rejects_if_the_interval_leaves_the_margin_out(values: list[float], margin: float) -> None:
    _, lo, hi = mean_interval(values)
    p = margin_p_value(values, margin)
    if abs(p - 0.05) > 1e-6 and hi - lo > 1e-6:
        assert (p < 0.05) == (not lo <= -margin <= hi)


def test_one_seed_and_equal_seeds_are_said_in_numbers_not_nan() -> None:
    assert mean_interval([70.0]) == (70.0, -inf, inf)
    assert margin_p_value([-9.0], 1.0) == 1.0
    assert mean_interval([0.1] * 3) == (0.1, 0.1, 0.1)
    assert (margin_p_value([-1.0] * 3, 1.0), margin_p_value([0.1] * 3, 1.0)) == (1.0, 0.0)
    assert mean_interval(paired_difference([70.3, 0.3], [70.1, 0.1])) == (0.2, 0.2, 0.2)


@pytest.mark.parametrize("values", [[], [1.0, nan], [inf, 1.0], [[1.0, 2.0]]])
def test_values_that_are_no_numbers_by_seed_are_refused(values: list[float]) -> None:
    with pytest.raises(UserError):
        mean_interval(values)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_raw_value_and_bonferroni_and_keeps_the_order(ps: list[float]) -> None:
    raw, adjusted = np.array(ps), holm(ps)
    assert (adjusted >= raw).all() and (adjusted <= np.minimum(1, raw * len(raw))).all()
    assert (np.diff(adjusted[np.argsort(raw)]) >= 0).all()


def test_holm_keeps_false_rejections_at_5_percent_where_raw_values_do_not() -> None:
    draws = np.random.default_rng(1).uniform(size=(2000, 6))
    false = np.mean([(holm(p) < 0.05).any() for p in draws])
    assert np.mean((draws < 0.05).any(axis=1)) > 0.2
    assert abs(false - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 2000)
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize("effect", [6, 11])
def test_two_seeds_are_too_few_where_scipy_knows_no_probability(effect: float) -> None:
    pairs = np.random.default_rng(0).normal(effect - 1, 1, size=(4000, 2))
    assert decided(pairs, 1.0) < 0.8 and seeds_needed(effect - 1, 1.0, 1.0) == 3


@pytest.mark.parametrize(
    ("mean", "sd", "margin"),
    [(0.25, 0.8, 1.0), (0.0, 1.0, 1.0), (-0.6, 1.3, 1.0), (-0.2, 0.9, 0.0), (-2.2, 1.1, 1.0), (-1.6, 1.9, 1.0)],
)
def test_the_seeds_needed_and_no_fewer_decide_four_studies_in_five(mean: float, sd: float, margin: float) -> None:
    n = seeds_needed(mean, sd, margin)
    assert n is not None
    studies = np.random.default_rng(n).normal(mean, sd, size=(4000, n))
    assert decided(studies[:, 1:], margin) - 0.015 < 0.8 < decided(studies, margin) + 0.015


@given(st.floats(-5, 5), st.floats(0, 20), st.floats(0, 3))
def test_more_spread_never_needs_fewer_seeds(mean: float, sd: float, margin: float) -> None:
    few, many = seeds_needed(mean, sd, margin), seeds_needed(mean, 2 * sd, margin)
    assert many is None or (few is not None and 2 <= few <= many)


def test_the_seeds_needed_are_those_of_another_program_none_for_the_margin() -> None:
    assert seeds_needed(0.0, 1.0, 1.0) == 10  # G*Power, two-sided one-sample t-test, d = 1
    assert seeds_needed(-1.0, 0.5, 1.0) is None and seeds_needed(-1.0 + 1e-6, 0.5, 1.0) is None
