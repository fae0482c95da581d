"""Signals are judged by what was measured: rank correlation with it, and what their choice costs more than the best."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from phasegate.checkpoint import load
from phasegate.counterfactual_head import CHANGES, SURVEY, save_head, train_head
from phasegate.expert_manager import ExpertManager
from phasegate.importance import PUBLISHED
from phasegate.model import Model
from phasegate.oracle import example_losses
from phasegate.phase_params import GroundTruth, Schedule, UsageLabels
from phasegate.probe import Probe
from phasegate.scoring import SCORE_COLUMNS, SCORES, rank_correlation, scorings
from phasegate.study import MEASURED, PREDICTED
from phasegate.survey import surveys
from phasegate.training import load_examples

TRUTH = GroundTruth(
    recovery_steps=3, repeats=2, surveys=2, survey_every=8, surveyed=1, candidates=1, price=1e-8,
    usage=UsageLabels(grow_above=1.3, prune_below=0.7),
)  # fmt: skip
values = st.one_of(st.integers(-3, 3).map(float), st.just(float("nan")), st.floats(-1e6, 1e6, width=32))
pairs = st.lists(st.tuples(values, values), max_size=8)


def correlation(known: list[tuple[float, float]]) -> float:
    """Of the pairs that are known: Pearson's correlation of their ranks, ties sharing the mean of theirs."""
    known = [pair for pair in known if np.isfinite(pair).all()]
    if len(known) < 3:
        return float("nan")
    x, y = (rankdata(side) - (len(known) + 1) / 2 for side in zip(*known, strict=True))
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())) if x.any() and y.any() else 0.0


def rank(known: list[tuple[float, float]]) -> float:
    return rank_correlation(*np.array(known, dtype=float).reshape(-1, 2).T)


@given(pairs)
def test_rank_correlation_is_that_of_the_ranks_of_known_pairs(known: list[tuple[float, float]]) -> None:
    assert rank(known) == pytest.approx(correlation(known), nan_ok=True)


@given(pairs)
def test_rank_correlation_sees_order_alone(known: list[tuple[float, float]]) -> None:
    found = rank(known)
    assert rank([(y, x) for x, y in known]) == pytest.approx(found, nan_ok=True)
    assert rank([(x, -y) for x, y in known]) == pytest.approx(-found, nan_ok=True)
    kept = [(x, x) for x, y in known if np.isfinite([x, y]).all()]
    assert rank(kept) == pytest.approx(float("nan") if len(kept) < 3 else float(len(set(kept)) > 1), nan_ok=True)
    assert rank([(2 * x, y) for x, y in known]) == pytest.approx(found, nan_ok=True)  # exact: no new ties


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, prepared: Path, baselines: Path, schedule: Schedule) -> Path:
    """A folder with the survey of seed 0, and a head that learned it as if it were another seed's."""
    folder = tmp_path_factory.mktemp("study")
    (trial,) = surveys(prepared, baselines, 1, schedule, TRUTH)
    trial.run(folder / "surveys/seed-0", **trial.arguments)
    save_head(train_head(survey(folder).assign(seed=1), 0), folder / "heads/seed-0")
    return folder


def survey(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "surveys/seed-0" / SURVEY)


def scored(folder: Path, prepared: Path, baselines: Path, schedule: Schedule) -> pd.DataFrame:
    (trial,) = scorings(prepared, baselines, folder / "surveys", folder / "heads", 1, schedule)
    assert all(path.exists() for path in trial.inputs)
    assert {folder / "surveys/seed-0" / SURVEY, *(folder / "heads/seed-0").iterdir()} < set(trial.inputs)
    trial.run(folder / "signals", **trial.arguments)
    return pd.read_csv(folder / "signals" / SCORES)


@pytest.fixture(scope="module")
def scores(study: Path, prepared: Path, baselines: Path, schedule: Schedule) -> pd.DataFrame:
    return scored(study, prepared, baselines, schedule).set_index("signal")


def test_every_signal_has_a_row_of_scores(scores: pd.DataFrame) -> None:
    assert ["signal", *scores.columns] == SCORE_COLUMNS
    named = {
        *(f"spearman_{change}" for change in CHANGES),
        *(f"regret_{gone}" for gone in (1, 2, 4)),
        "seed",
        "seconds",
    }
    assert named < set(scores.columns) and list(scores.index) == [*PUBLISHED, PREDICTED, MEASURED]
    assert (scores["seed"] == 0).all() and (scores["seconds"] > 0).all()
    assert (scores[["regret_1", "regret_2"]].drop("gradmax") >= 0).all(axis=None)
    assert scores["regret_4"].isna().all()  # of five experts two must stay


def test_what_a_signal_does_not_say_is_blank(scores: pd.DataFrame) -> None:
    said = scores[["spearman_prune", "spearman_recovered", "regret_1", "regret_2"]].notna()
    assert not said.loc["gradmax"].any() and said.drop("gradmax").all(axis=None)
    assert scores.index[scores["spearman_grow"].isna()].tolist() == ["zero_hits"]


def test_scores_come_from_the_signal_split_and_are_judged_on_the_gate_split(
    scores: pd.DataFrame, study: Path, prepared: Path, baselines: Path
) -> None:
    _, signal, gate = load_examples(prepared, torch.device("cpu"))
    model, measured = load(baselines / "seed-0", gate).model, survey(study)
    assert isinstance(model, Model)
    rows = []
    for block in (0, 1):
        truth = measured[(measured["step"] == 0) & (measured["block"] == block)]
        usage = PUBLISHED["usage_frequency"](Probe(model, block, signal), torch.Generator()).prune
        assert usage is not None and len(set(usage.tolist())) == 5
        row = [
            correlation(list(zip(usage.tolist(), sign * truth[f"{change}_gate"], strict=True)))
            for change, sign in (("prune", 1), ("recovered", 1), ("grow", -1))
        ]
        for gone in (1, 2):
            losses = {}
            for some in combinations(range(5), gone):
                with model.spare_layer(block) as spare:
                    for expert in some:
                        ExpertManager(spare).remove(expert)
                    losses[some] = float(example_losses(model, gate).mean())
            chosen = tuple(sorted(usage.argsort()[:gone].tolist()))
            row += [losses[chosen] - min(losses.values()), sum(losses.values()) / len(losses) - min(losses.values())]
        rows.append(row)
    names = ["spearman_prune", "spearman_recovered", "spearman_grow", "regret_1", "chance_1", "regret_2", "chance_2"]
    found = [float(scores[name]["usage_frequency"]) for name in names]
    assert found == pytest.approx(np.mean(rows, axis=0).tolist(), abs=1e-5)
    assert scores["chance_1"].nunique() == scores["chance_2"].nunique() == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_signal_that_knows_the_truth_is_perfect_and_its_opposite_is_as_wrong_as_can_be(
    sign: int, scores: pd.DataFrame, study: Path, tmp_path: Path, prepared: Path, baselines: Path, schedule: Schedule
) -> None:
    doctored = survey(study)
    for change in CHANGES:
        doctored[f"{change}_part"] = sign * doctored[f"{change}_gate_rest"]
    (tmp_path / "surveys/seed-0").mkdir(parents=True)
    doctored.to_csv(tmp_path / "surveys/seed-0" / SURVEY, index=False)
    (tmp_path / "heads").symlink_to(study / "heads")
    found = scored(tmp_path, prepared, baselines, schedule).set_index("signal")
    perfect = found.loc[MEASURED]
    assert [perfect[f"spearman_{change}"] for change in CHANGES] == pytest.approx([sign] * 3)
    if sign == 1:
        assert perfect["regret_1"] == pytest.approx(0, abs=1e-6)
    else:
        assert perfect["regret_1"] >= found["regret_1"].max() > perfect["chance_1"]
    others = found.drop(index=MEASURED).drop(columns="seconds")
    pd.testing.assert_frame_equal(others, scores.drop(index=MEASURED).drop(columns="seconds"))


def test_a_head_that_learned_the_truth_ranks_by_it(
    study: Path, tmp_path: Path, prepared: Path, baselines: Path, schedule: Schedule
) -> None:
    truth = survey(study).assign(seed=1)
    for change in CHANGES:  # what signals are judged by, known for certain
        truth[change], truth[f"{change}_error"] = truth[f"{change}_gate"], 1e-4
    save_head(train_head(truth, 0), tmp_path / "heads/seed-0")
    (tmp_path / "surveys").symlink_to(study / "surveys")
    predicted = scored(tmp_path, prepared, baselines, schedule).set_index("signal").loc[PREDICTED]
    assert predicted["spearman_prune"] > 0.5 and predicted["spearman_recovered"] > 0.5
    assert predicted["spearman_grow"] > 0.5
    assert predicted["regret_1"] < predicted["chance_1"]
