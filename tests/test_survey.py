"""A survey has a row for every expert: features from the gate split, and measured labels from the signal split."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from phasegate.params.fields import override
from phasegate.params.phases import GroundTruth, Schedule
from phasegate.signals import survey
from phasegate.signals.features import CHANGES, FEATURES, describe
from phasegate.signals.forks import estimate
from phasegate.signals.predictor import SURVEY
from phasegate.surgery.probe import Probe
from phasegate.training.course import load_start
from tests.models import Forks, losses_after_removal, removed


def surveyed(folder: Path, prepared: Path, baselines: Path, schedule: Schedule, truth: GroundTruth) -> pd.DataFrame:
    (trial,) = survey.surveys(prepared, baselines, range(1), schedule, truth)
    assert trial.name == "seed-0" and all(path.exists() for path in trial.inputs)
    trial.run(folder, **trial.arguments)
    return pd.read_csv(folder / SURVEY)


@pytest.fixture(scope="module")
def table(surveys: Path) -> pd.DataFrame:
    return pd.read_csv(surveys / "seed-0" / SURVEY)


@pytest.fixture
def forks(prepared: Path, baselines: Path, schedule: Schedule, truth: GroundTruth) -> Forks:
    """Forks of the checkpoint that is surveyed."""
    model, optimizer, course = load_start(prepared, baselines / "seed-0", 0, schedule)
    return Forks(model, optimizer, course, truth.recovery_steps, truth.repeats)


def test_every_expert_has_a_row_in_every_survey(table: pd.DataFrame) -> None:
    assert list(table.columns) == survey.SURVEY_COLUMNS and (table["seed"] == 0).all()
    surveys = table.groupby(["step", "block"])["expert"]
    assert list(surveys.groups) == [(0, 0), (0, 1), (8, 0), (8, 1)]
    assert surveys.apply(lambda experts: experts.is_unique).all() and surveys.size().between(4, 7).all()
    assert surveys.apply(list)[0].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert table[[*FEATURES]].notna().all(axis=None)


def test_the_first_survey_measures_all_experts_and_later_ones_a_few(table: pd.DataFrame) -> None:
    first, later = table[table["step"] == 0], table[table["step"] == 8]
    labels = [column for column in survey.SURVEY_COLUMNS if column.startswith(CHANGES)]
    assert first[labels].notna().all(axis=None) and later[["prune", "prune_gate"]].notna().all(axis=None)
    assert (first[[f"{change}_error" for change in CHANGES]] > 0).all(axis=None)
    for change in ("recovered", "grow"):
        measured = later[later[change].notna()]
        assert measured.groupby("block").size().tolist() == [1, 1]
        columns = [f"{change}{part}" for part in ("_error", "_gate", "_part", "_gate_rest")]
        assert measured[columns].notna().all(axis=None)


def test_surgery_goes_on_between_surveys_and_ages_tell(table: pd.DataFrame) -> None:
    later = table[table["step"] == 8]
    born = later["expert"] >= 5
    assert born.any() and not (table["expert"][:10] >= 5).any()
    assert later["age"].tolist() == pytest.approx([math.log(8 - 4 if new else 8 + 60) for new in born])
    assert table["progress"].unique().tolist() == [0, pytest.approx(8 / 60)]
    assert later["has_sibling"].sum() == 2 * (born & (later["has_sibling"] == 1)).sum()


@pytest.mark.parametrize("block", [0, 1])
def test_features_are_those_of_the_gate_split(table: pd.DataFrame, forks: Forks, block: int) -> None:
    expected = describe(Probe(forks.model, block, forks.course.gate), torch.full((5,), 60), progress=0)
    other = describe(Probe(forks.model, block, forks.course.signal), torch.full((5,), 60), progress=0)
    found = torch.tensor(table[(table["step"] == 0) & (table["block"] == block)][list(FEATURES)].to_numpy()).float()
    torch.testing.assert_close(found, expected)
    assert (found - other).abs().max() > 0.01


@pytest.mark.parametrize("block", [0, 1])
def test_labels_are_measured_on_both_splits(table: pd.DataFrame, forks: Forks, block: int) -> None:
    course, rows = forks.course, table[(table["step"] == 0) & (table["block"] == block)].set_index("expert")
    all_signal, all_gate = forks.measure(block, 0, [*map(removed, range(5))])
    labels = estimate(all_signal)
    for expert in (0, 3):
        row = {name: float(rows[name][expert]) for name in rows.columns}
        probes = [Probe(forks.model, block, split) for split in (course.signal, course.gate)]
        changes = [losses_after_removal(probe, [expert]) - probe.losses for probe in probes]
        on_signal, on_gate = (float(change.mean()) for change in changes)
        assert [row["prune"], row["prune_part"]] == pytest.approx([on_signal] * 2, abs=1e-6)
        assert [row["prune_gate"], row["prune_gate_rest"]] == pytest.approx([on_gate] * 2, abs=1e-6)
        assert row["prune_error"] == pytest.approx(float(changes[0].std() / len(changes[0]) ** 0.5), rel=1e-3)
        label, (first, second) = [float(part[expert]) for part in labels], all_gate[expert].mean(1).tolist()
        assert [row["recovered"], row["recovered_error"]] == pytest.approx(label, abs=1e-6)
        assert row["recovered_part"] == pytest.approx(float(all_signal[expert, 0].mean()), abs=1e-6)
        assert row["recovered_gate_rest"] == pytest.approx(second, abs=1e-6)
        assert row["recovered_gate"] == pytest.approx((first + second) / 2, abs=1e-6)


def test_the_same_seed_gives_the_same_bits_and_what_may_not_be_done_has_no_labels(
    table: pd.DataFrame, tmp_path: Path, prepared: Path, baselines: Path, schedule: Schedule, truth: GroundTruth
) -> None:
    assert surveyed(tmp_path, prepared, baselines, schedule, truth).equals(table)
    full = override(schedule, {"min_experts": 4, "max_experts": 5}, "p7b")
    once = surveyed(tmp_path, prepared, baselines, full, override(truth, {"surveys": 1}, "p7b4"))
    assert len(once) == 10 and once["grow"].isna().all() and once["recovered"].notna().all()
