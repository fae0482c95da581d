"""A survey has a row for every expert: features from the gate split, and measured labels from the signal split."""

import copy
import math
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch

from phasegate.checkpoint import load
from phasegate.counterfactual import Forks, estimate
from phasegate.counterfactual_head import CHANGES, FEATURES, SURVEY, describe
from phasegate.expert_manager import ExpertManager
from phasegate.model import Model
from phasegate.oracle import example_losses
from phasegate.phase_params import GroundTruth, Schedule, UsageLabels
from phasegate.probe import Probe
from phasegate.sections import override
from phasegate.survey import SURVEY_COLUMNS, surveys
from phasegate.training import Course, load_examples

TRUTH = GroundTruth(
    recovery_steps=3, repeats=2, surveys=2, survey_every=8, surveyed=1, candidates=1, price=1e-8,
    usage=UsageLabels(grow_above=1.3, prune_below=0.7),
)  # fmt: skip
CLOCKS = ["removal_seconds", "fork_seconds"]


def surveyed(folder: Path, prepared: Path, baselines: Path, schedule: Schedule, truth: GroundTruth) -> pd.DataFrame:
    (trial,) = surveys(prepared, baselines, 1, schedule, truth)
    assert trial.name == "seed-0" and all(path.exists() for path in trial.inputs)
    trial.run(folder, **trial.arguments)
    return pd.read_csv(folder / SURVEY)


@pytest.fixture(scope="module")
def table(
    tmp_path_factory: pytest.TempPathFactory, prepared: Path, baselines: Path, schedule: Schedule
) -> pd.DataFrame:
    return surveyed(tmp_path_factory.mktemp("survey"), prepared, baselines, schedule, TRUTH)


@pytest.fixture
def forks(prepared: Path, baselines: Path, schedule: Schedule) -> Forks:
    """Forks of the checkpoint that is surveyed."""
    train, signal, gate = load_examples(prepared, torch.device("cpu"))
    start = load(baselines / "seed-0", gate)
    assert isinstance(start.model, Model) and start.optimizer is not None
    course = Course(train, signal, gate, start.record.training, schedule, 0)
    return Forks(start.model, start.optimizer, course, TRUTH.recovery_steps, TRUTH.repeats)


def test_every_expert_has_a_row_in_every_survey(table: pd.DataFrame) -> None:
    assert list(table.columns) == SURVEY_COLUMNS and (table["seed"] == 0).all()
    surveys = table.groupby(["step", "block"])["expert"]
    assert list(surveys.groups) == [(0, 0), (0, 1), (8, 0), (8, 1)]
    assert surveys.apply(lambda experts: experts.is_unique).all() and surveys.size().between(4, 7).all()
    assert surveys.apply(list)[0].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert table[[*FEATURES, *CLOCKS[:1]]].notna().all(axis=None)


def test_the_first_survey_measures_all_experts_and_later_ones_a_few(table: pd.DataFrame) -> None:
    first, later = table[table["step"] == 0], table[table["step"] == 8]
    labels = [column for column in SURVEY_COLUMNS if column.startswith(CHANGES)] + CLOCKS
    assert first[labels].notna().all(axis=None) and later[[*map("prune{}".format, ("", "_gate"))]].notna().all(
        axis=None
    )
    assert (first[[f"{change}_error" for change in CHANGES]] > 0).all(axis=None) and (first[CLOCKS] > 0).all(axis=None)
    for change in ("recovered", "grow"):
        measured = later[later[change].notna()]
        assert measured.groupby("block").size().tolist() == [1, 1]
        assert (
            measured[[f"{change}{part}" for part in ("_error", "_gate", "_part", "_gate_rest")]].notna().all(axis=None)
        )
        assert measured["fork_seconds"].notna().all()


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
def test_labels_are_measured_on_the_signal_split_and_again_on_the_gate(
    table: pd.DataFrame, forks: Forks, block: int
) -> None:
    course, rows = forks.course, table[(table["step"] == 0) & (table["block"] == block)].set_index("expert")
    for expert in (0, 3):
        row = {name: float(rows[name][expert]) for name in rows.columns}
        removed = copy.deepcopy(forks.model)
        ExpertManager(removed.layers[block]).remove(expert)
        changes = [
            example_losses(removed, split) - example_losses(forks.model, split)
            for split in (course.signal, course.gate)
        ]
        on_signal, on_gate = (float(change.mean()) for change in changes)
        assert [row["prune"], row["prune_part"]] == pytest.approx([on_signal] * 2, abs=1e-6)
        assert [row["prune_gate"], row["prune_gate_rest"]] == pytest.approx([on_gate] * 2, abs=1e-6)
        assert row["prune_error"] == pytest.approx(float(changes[0].std() / len(changes[0]) ** 0.5), rel=1e-3)
        forked = forks.measure(block, 0, [partial(remove, expert)])
        label, (first, second) = estimate(forked.signal[0]), forked.gate[0].mean(1).tolist()
        assert [row["recovered"], row["recovered_error"]] == pytest.approx([*map(float, label)], abs=1e-6)
        assert row["recovered_part"] == pytest.approx(float(forked.signal[0, 0].mean()), abs=1e-6)
        assert row["recovered_gate_rest"] == pytest.approx(second, abs=1e-6)
        assert row["recovered_gate"] == pytest.approx((first + second) / 2, abs=1e-6)


def remove(expert: int, manager: ExpertManager, repeat: int) -> None:
    manager.remove(expert)


def test_the_same_seed_gives_the_same_bits(
    table: pd.DataFrame, tmp_path: Path, prepared: Path, baselines: Path, schedule: Schedule
) -> None:
    again = surveyed(tmp_path, prepared, baselines, schedule, TRUTH)
    assert again.drop(columns=CLOCKS).equals(table.drop(columns=CLOCKS))


def test_of_what_may_not_be_done_there_are_no_labels(
    tmp_path: Path, prepared: Path, baselines: Path, schedule: Schedule
) -> None:
    full = override(schedule, {"min_experts": 4, "max_experts": 5}, "p7b")
    once = override(TRUTH, {"surveys": 1}, "p7b4")
    table = surveyed(tmp_path, prepared, baselines, full, once)
    assert len(table) == 10 and table["grow"].isna().all() and table["recovered"].notna().all()
