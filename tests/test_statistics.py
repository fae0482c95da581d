"""The statistics keep their promises: coverage, correction, and no silent NaN."""

from functools import partial
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from phasegate.base.errors import UserError
from phasegate.verdicts import statistics
from phasegate.verdicts.statistics import half_width, holm, margin_p_value, paired_difference

VALUES = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=12)
mean_interval = partial(statistics.mean_interval, confidence=0.95)


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


def test_an_error_from_elsewhere_adds_in_quadrature() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    _, lo, hi = mean_interval(values)
    error = float(stats.sem(values))
    _, wide_lo, wide_hi = mean_interval(values, further_error=2 * error)
    assert (wide_hi - wide_lo) / (hi - lo) == pytest.approx(np.sqrt(5))
    assert half_width(error, 4, 0.95) == pytest.approx((hi - lo) / 2) and half_width(error, 1, 0.95) == inf
