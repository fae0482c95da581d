"""Signals are judged by what was measured: rank correlation with it, and what their choice costs more than the best."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, rankdata

from phasegate.params.names import MEASURED, PREDICTED
from phasegate.params.phases import Schedule
from phasegate.signals import predictor
from phasegate.signals.features import CHANGES
from phasegate.signals.published import PUBLISHED
from phasegate.signals.signal_scores import SCORE_COLUMNS, SCORES, area_under_roc, rank_correlation, scorings, with_dead
from phasegate.surgery.continuation import Arm, train_arm
from phasegate.surgery.operations import kill_some
from phasegate.surgery.probe import Probe
from phasegate.training.course import load_start
from tests.models import losses_after_removal

DEAD = 1  # of five experts
Score = Callable[[Path], pd.DataFrame]
values = st.one_of(st.integers(-3, 3).map(float), st.just(float("nan")), st.floats(-1e6, 1e6, width=32))
pairs = st.lists(st.tuples(values, values), max_size=8)


def correlation(known: list[tuple[float, float]]) -> float:
    """Of the pairs that are known: Pearson's correlation of their ranks, ties sharing the mean of theirs."""
    known = [pair for pair in known if np.isfinite(pair).all()]
    if len(known) < 3:
        return float("nan")
    x, y = (rankdata(side) - (len(known) + 1) / 2 for side in zip(*known, strict=True))
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())) if x.any() and y.any() else 0.0


@given(pairs)
def test_rank_correlation_is_that_of_the_ranks_of_known_pairs(known: list[tuple[float, float]]) -> None:
    found = rank_correlation(*np.array(known, dtype=float).reshape(-1, 2).T)
    assert found == pytest.approx(correlation(known), nan_ok=True)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, surveys: Path) -> Path:
    """A folder with the survey of seed 0, and a head that learned it as if it were another seed's."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "surveys").symlink_to(surveys)
    predictor.save_head(predictor.train_head(survey(folder).assign(seed=1), 0), folder / "heads/seed-0")
    return folder


def survey(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "surveys/seed-0" / predictor.SURVEY)


@pytest.fixture(scope="module")
def score(prepared: Path, baselines: Path, schedule: Schedule) -> Score:
    """Scores the signals from the surveys and heads of a folder."""

    def scored(folder: Path) -> pd.DataFrame:
        (trial,) = scorings(prepared, baselines, folder / "surveys", folder / "heads", range(1), schedule, DEAD)
        assert all(path.exists() for path in trial.inputs)
        assert {folder / "surveys/seed-0" / predictor.SURVEY, *(folder / "heads/seed-0").iterdir()} < set(trial.inputs)
        trial.run(folder / "signals", **trial.arguments)
        return pd.read_csv(folder / "signals" / SCORES).set_index("signal")

    return scored


@pytest.fixture(scope="module")
def scores(study: Path, score: Score) -> pd.DataFrame:
    return score(study)


def test_every_signal_has_a_row_of_scores_blank_where_it_says_nothing(scores: pd.DataFrame) -> None:
    assert ["signal", *scores.columns] == SCORE_COLUMNS
    assert list(scores.index) == [*PUBLISHED, PREDICTED, MEASURED]
    assert (scores["seed"] == 0).all()
    assert (scores[["regret_1", "regret_2"]].drop("gradmax") >= 0).all(axis=None)
    assert scores["regret_4"].isna().all()  # of five experts two must stay
    said = scores[["spearman_prune", "spearman_recovered", "regret_1", "regret_2"]].notna()
    assert not said.loc["gradmax"].any() and said.drop("gradmax").all(axis=None)
    assert scores.index[scores["spearman_grow"].isna()].tolist() == ["zero_hits"]
    assert scores.index[scores["auc_dead"].isna()].tolist() == ["gradmax"]


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2))
def test_the_area_under_the_roc_curve_is_that_of_the_rank_test(given: list[tuple[int, bool]]) -> None:
    scores, dead = np.array([score for score, _ in given], float), np.array([True, False, *(d for _, d in given[2:])])
    expected = mannwhitneyu(scores[~dead], scores[dead]).statistic / (dead.sum() * (~dead).sum())
    assert area_under_roc(scores, dead) == pytest.approx(expected)
    assert area_under_roc(-dead.astype(float), dead) == 1 and area_under_roc(dead.astype(float), dead) == 0
    assert area_under_roc(np.zeros(len(dead)), dead) == 0.5
    for unknown in (np.inf, -np.inf, np.nan):
        assert np.isnan(area_under_roc(np.append(scores, unknown), np.append(dead, True)))


def test_a_signal_that_draws_tells_no_dead_expert_from_a_living_one() -> None:
    dead, draws = np.arange(12) < 4, np.random.default_rng(0)
    areas = [area_under_roc(draws.random(12), dead) for _ in range(1000)]
    assert np.mean(areas) == pytest.approx(0.5, abs=0.02) and np.std(areas) > 0.1


def test_the_planted_dead_are_those_of_7c3_as_its_controllers_first_see_them(
    scores: pd.DataFrame, prepared: Path, baselines: Path, schedule: Schedule, tmp_path: Path
) -> None:
    model, optimizer, course = load_start(prepared, baselines / "seed-0", 0, schedule)
    kill_some(model.layers, optimizer, DEAD, 0)
    planted = with_dead(*load_start(prepared, baselines / "seed-0", 0, schedule), DEAD)
    train_arm(tmp_path, model, optimizer, course, "p7c3", "leave", Arm(dead=DEAD), until=schedule.act_every)
    for name, value in model.named_parameters():
        assert torch.equal(planted.get_parameter(name), value), name
    areas = []
    for block, layer in enumerate(model.layers):
        [dead] = [e for e in range(5) if not layer.weights(e).any()]
        usage = Probe(model, block, course.signal).signals.load
        living = [float(load) for e, load in enumerate(usage) if e != dead]
        areas.append(np.mean([(load > usage[dead]) + (load == usage[dead]) / 2 for load in living]))
    assert scores["auc_dead"]["usage_frequency"] == pytest.approx(np.mean(areas))
    seeing = ["gate_times_norm", "weight_norm", "taylor_saliency", "mean_norm", "gradient_squared"]
    assert (scores["auc_dead"][seeing] == 1).all() and scores["auc_dead"]["zero_hits"] >= 0.5


def test_scores_come_from_the_signal_split_and_are_judged_on_the_gate_split(
    scores: pd.DataFrame, study: Path, prepared: Path, baselines: Path, schedule: Schedule
) -> None:
    model, _, course = load_start(prepared, baselines / "seed-0", 0, schedule)
    measured, rows = survey(study), []
    for block in (0, 1):
        truth = measured[(measured["step"] == 0) & (measured["block"] == block)]
        usage = PUBLISHED["usage_frequency"](Probe(model, block, course.signal), torch.Generator()).prune
        assert usage is not None and len(set(usage.tolist())) == 5
        row = [
            correlation(list(zip(usage.tolist(), sign * truth[f"{change}_gate"], strict=True)))
            for change, sign in (("prune", 1), ("recovered", 1), ("grow", -1))
        ]
        for gone in (1, 2):
            probe, sets = Probe(model, block, course.gate), combinations(range(5), gone)
            losses = {some: float(losses_after_removal(probe, some).mean()) for some in sets}
            chosen = tuple(sorted(usage.argsort()[:gone].tolist()))
            row += [loss - min(losses.values()) for loss in (losses[chosen], sum(losses.values()) / len(losses))]
        rows.append(row)
    names = ["spearman_prune", "spearman_recovered", "spearman_grow", "regret_1", "chance_1", "regret_2", "chance_2"]
    found = [float(scores[name]["usage_frequency"]) for name in names]
    assert found == pytest.approx(np.mean(rows, axis=0).tolist(), abs=1e-5)
    assert scores["chance_1"].nunique() == scores["chance_2"].nunique() == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_signal_that_knows_the_truth_is_perfect_and_its_opposite_is_the_worst(
    sign: int, scores: pd.DataFrame, study: Path, score: Score, tmp_path: Path
) -> None:
    doctored = survey(study)
    for change in CHANGES:
        doctored[f"{change}_part"] = sign * doctored[f"{change}_gate_rest"]
    (tmp_path / "surveys/seed-0").mkdir(parents=True)
    doctored.to_csv(tmp_path / "surveys/seed-0" / predictor.SURVEY, index=False)
    (tmp_path / "heads").symlink_to(study / "heads")
    found = score(tmp_path)
    perfect = found.loc[MEASURED]
    assert [perfect[f"spearman_{change}"] for change in CHANGES] == pytest.approx([sign] * 3)
    if sign == 1:
        assert perfect["regret_1"] == pytest.approx(0, abs=1e-6)
    else:
        assert perfect["regret_1"] >= found["regret_1"].max() > perfect["chance_1"]
    pd.testing.assert_frame_equal(found.drop(index=MEASURED), scores.drop(index=MEASURED))


def test_a_head_that_learned_the_truth_ranks_by_it(study: Path, score: Score, tmp_path: Path) -> None:
    truth = survey(study).assign(seed=1)
    for change in CHANGES:  # what signals are judged by, known for certain
        truth[change], truth[f"{change}_error"] = truth[f"{change}_gate"], 1e-4
    predictor.save_head(predictor.train_head(truth, 0), tmp_path / "heads/seed-0")
    (tmp_path / "surveys").symlink_to(study / "surveys")
    predicted = score(tmp_path).loc[PREDICTED]
    assert all(predicted[f"spearman_{change}"] > 0.45 for change in CHANGES), predicted  # five experts: steps of 0.1
    assert predicted["regret_1"] < predicted["chance_1"]
