"""Verdicts follow from the trials, the margin and the primary arm, and from nothing else."""

from collections.abc import Iterable, Mapping
from math import inf, isfinite
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasegate.base.errors import UserError
from phasegate.pretraining.ranking import ranked
from phasegate.records.tables import COSTS, read_table, write_table
from phasegate.records.trial_folder import FAILURE_COLUMNS
from phasegate.verdicts import decisions
from phasegate.verdicts.decisions import AVERAGED, Decision, decide, decision_rows, metrics
from phasegate.verdicts.leaderboard import leaderboard, reference_rows
from phasegate.verdicts.statistics import holm, margin_p_value

PRIMARY = {"p7b1": "noise_acting", "p7b2": "split"}
CONTROL = np.array([67.0, 66.4, 67.9, 68.2])
DOUBTFUL = [-0.55, 0.35, -0.3, 0.35]  # p = 0.025 against the margin: a GO alone, not as one of four
KEYS = ["phase", "arm", "seed"]
CANDIDATES = {"c": 70, "b": 70, "a": 70, "z": 60}
SIZES = dict(zip(AVERAGED, (12, 14, 9000, 2000, 4000), strict=True))


def trials_of(arms: Mapping[str, Iterable[float]]) -> pd.DataFrame:
    """Trials of arms, `phase/arm`, with these accuracies seed by seed."""
    trials = [(*key.split("/"), seed, value) for key, values in arms.items() for seed, value in enumerate(values)]
    return pd.DataFrame(trials, columns=[*KEYS, "accuracy"]).assign(**SIZES)


def trials(**deltas: list[float]) -> pd.DataFrame:
    """Trials whose arms (`phase__arm`) differ from the control by the deltas given, seed by seed."""
    arms = {"p7a__continue": [0.0] * 4, "p7a__baseline": [-1.0, -1.2, -0.8, -1.1], **deltas}
    return trials_of({key.replace("__", "/"): CONTROL[: len(values)] + values for key, values in arms.items()})


STUDY = trials(
    p7b1__noise=[-0.2, 0.1, 0.0, -0.1],
    p7b1__noise_acting=[-5.0, -6.0, -5.5, -4.9],
    p7b2__split=[0.1, 0.3, -0.1, 0.2],
    p7b2__clone=[-2.5, 0.5, -1.5, 0.0],
)
NAMES = (STUDY["phase"] + "/" + STUDY["arm"]).unique()
NONE = pd.DataFrame(columns=FAILURE_COLUMNS)  # no failures


def decided(study: pd.DataFrame = STUDY, failures: pd.DataFrame = NONE, margin: float = 1.0) -> pd.DataFrame:
    """The decisions by arm."""
    return decide(study, failures, margin, 0.95, PRIMARY).set_index("arm", drop=False)


def failing(*names: str, study: pd.DataFrame = STUDY) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The study with some trials failed, `phase/arm/seed`: the trials that finished, and the failures."""
    failed = (study["phase"] + "/" + study["arm"] + "/" + study["seed"].astype(str)).isin(names)
    assert failed.sum() == len(names)
    return study[~failed], study[failed][KEYS].assign(step=7, reason="the loss is nan")


def test_a_study_is_decided_primary_arms_first_and_plugins_last() -> None:
    table = decided()
    assert list(table.columns) == list(Decision._fields)
    verdicts = {"baseline": "BASELINE", "continue": "CONTROL", "noise_acting": "NO-GO", "noise": "GO"}
    assert list(table["verdict"].items()) == [*verdicts.items(), ("split", "GO"), ("clone", "INCONCLUSIVE")]
    assert table["seeds_needed"].notna().tolist() == [False] * 5 + [True]
    study = trials(surgery__split=[0.0] * 4, plugins__mine=[0.0] * 4, p7b1__noise=[0.0] * 4)
    table = decide(study, NONE, 1.0, 0.95, {"p7b1": "noise", "surgery": "split", "plugins": "mine"})
    assert table["phase"].tolist() == ["p7a", "p7a", "p7b1", "surgery", "plugins"]


def test_an_exploratory_arm_also_has_to_pass_holm() -> None:
    among = trials(p7b1__noise_acting=[0.0] * 4, **{f"p7b1__{name}": DOUBTFUL for name in "abcd"})
    assert decided(trials(p7b1__noise_acting=DOUBTFUL))["verdict"]["noise_acting"] == "GO"
    assert decided(among)["verdict"]["a"] == "INCONCLUSIVE"


def test_another_phase_changes_nothing_in_this_one_and_references_nothing_at_all() -> None:
    one, other = (decided(study).query("phase == 'p7b2'") for study in (STUDY[STUDY["phase"] != "p7b1"], STUDY))
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert one["seeds_needed"].notna().any()
    extra = STUDY[STUDY["arm"] == "split"].assign(phase="references", arm="mlp", n_routed_start=np.nan)
    pd.testing.assert_frame_equal(decided(pd.concat([extra, STUDY]), extra[KEYS]), decided())


@given(st.lists(st.lists(st.integers(-40, 20), min_size=4, max_size=4), min_size=2, max_size=4))
def test_an_undecided_arm_always_needs_more_seeds_than_it_has(arms: list[list[int]]) -> None:
    deltas = {f"p7b2__{'split' if i == 0 else i}": [x / 10 for x in arm] for i, arm in enumerate(arms)}
    needed = decided(trials(**deltas)).dropna(subset="seeds_needed")
    assert (needed["seeds_needed"] > needed["n_seeds"]).all() and (needed["verdict"] == "INCONCLUSIVE").all()


@given(st.floats(0, 5), st.floats(0, 5))
def test_a_wider_margin_never_turns_a_primary_go_back(small: float, more: float) -> None:
    strict, lax = (decided(margin=margin)["verdict"]["split"] for margin in (small, small + more))
    assert strict != "GO" or lax == "GO"


def test_one_seed_decides_nothing_and_its_headline_has_no_infinite_numbers() -> None:
    table = decided(STUDY[STUDY["seed"] == 0])
    assert set(table["verdict"]) == {"BASELINE", "CONTROL", "INCONCLUSIVE"} and table["delta_lo"].eq(-inf).all()
    headline = metrics(table, "p7b1", "primary")
    assert headline["arm"] == "noise_acting" and headline["delta_pp"] == pytest.approx(-5)
    assert "delta_lo" not in headline and "seeds_needed" not in headline


@pytest.mark.parametrize(("delta", "verdicts"), [(0, ["GO"] * 2), (-1, ["GO", "INCONCLUSIVE"]), (-1.1, ["NO-GO"] * 2)])
def test_equal_differences_have_a_verdict_and_no_nan(delta: float, verdicts: list[str]) -> None:
    table = decided(trials(p7b2__split=[delta] * 4, p7b2__clone=[delta] * 4))
    for arm, verdict in zip(("split", "clone"), verdicts, strict=True):
        headline = metrics(table, "p7b2", arm)
        assert headline["verdict"] == verdict and "seeds_needed" not in headline
        assert [headline[bound] for bound in ("delta_lo", "delta_pp", "delta_hi")] == [delta] * 3
        assert all(isfinite(value) for value in headline.values() if not isinstance(value, str))


@pytest.mark.parametrize("seeds", [5, 20])
def test_a_difference_of_the_margin_is_rarely_decided(seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "seeds_needed", lambda *_: None)  # slow, and not asked for here
    deltas = np.random.default_rng(seeds).normal(-1, 0.8, size=(600, seeds))
    studies = {f"{study}/split": 70 + row for study, row in enumerate(deltas)} | {"p7a/continue": [70.0] * seeds}
    table = decide(trials_of(studies), NONE, 1.0, 0.95, {str(study): "split" for study in range(600)})
    rates = table[table["primary"]]["verdict"].value_counts(normalize=True)
    assert abs(rates["GO"] - 0.025) < 0.02 and abs(rates["NO-GO"] - 0.025) < 0.02


def test_the_seeds_an_exploratory_arm_needs_decide_it_whatever_the_others_do() -> None:
    arms = {f"p7b2__{arm}": [0.0] * 4 for arm in ("split", "reinit", "split_thresholds")}
    [clone] = decision_rows(decided(trials(**arms, p7b2__clone=[-1.5, 0.5, -1.7, 0.7])).query("arm == 'clone'"))
    draws = np.random.default_rng(0).normal(clone.delta_pp, clone.delta_sd, size=(4000, int(clone.seeds_needed)))
    ps = [margin_p_value(study, 1.0) for study in draws]
    worst, easy = (np.mean([holm([p, other, other])[0] < 0.05 for p in ps]) for other in (1, 0))
    assert abs(worst - 0.8) < 0.015 and easy > 0.85


def test_missing_seeds_and_wrong_numbers_are_named() -> None:
    lacking, control = (STUDY["arm"] == "split") & (STUDY["seed"] == 3), STUDY["arm"] == "continue"
    for study, sentence in (
        (STUDY[~lacking], "p7b2, arm split has no trial for seed 3, but phase p7a, arm continue has one"),
        (STUDY[~(control & (STUDY["seed"] == 2))], "arm continue has no trial for seed 2, but phase p7.*has one"),
        (STUDY.assign(accuracy=STUDY["accuracy"].mask(lacking)), "accuracy of phase p7b2, arm split, seed 3 is nan"),
        (STUDY.assign(accuracy=STUDY["accuracy"].mask(control, inf)), "phase p7a, arm continue, seed 0 is inf"),
        (STUDY.assign(params_active=np.nan), "params_active of phase p7a, arm continue, seed 0 is nan"),
        (STUDY.drop(columns="params_total"), "the table lacks the column params_total"),
        (STUDY[~control], "no control arm: phase p7a, arm continue"),
        (pd.concat([STUDY, STUDY.tail(1)]), "twice"),
        (STUDY.replace({"arm": {"split": "merge"}}), "the primary arm of phase p7b2 is split: it has no trials"),
    ):
        with pytest.raises(UserError, match=sentence):
            decided(study)


def test_an_arm_with_a_failed_trial_is_never_go_and_compares_the_other_seeds() -> None:
    table, finished = decided(*failing("p7b2/split/3", "p7b1/noise/0")), decided()
    for arm in ("split", "noise"):
        assert finished["verdict"][arm] == "GO" and table["verdict"][arm] == "INCONCLUSIVE"
        assert table["delta_lo"][arm] >= -1 and table["seeds_needed"].isna()[arm]  # more seeds would not help
    assert list(table.loc["split", ["n_seeds", "n_failed"]]) == [3, 1]
    assert table["delta_pp"]["split"] == pytest.approx(0.1)
    others = ["baseline", "continue", "noise_acting", "clone"]
    pd.testing.assert_frame_equal(table.loc[others].drop(columns="p_holm"), finished.loc[others].drop(columns="p_holm"))


def test_what_is_left_of_an_arm_can_be_a_no_go_or_need_seeds_to_become_one() -> None:
    table = decided(*failing("p7b1/noise_acting/1", "p7b2/clone/1"))
    assert table["verdict"]["noise_acting"] == "NO-GO" and table["n_failed"]["noise_acting"] == 1
    assert table["verdict"]["clone"] == "INCONCLUSIVE" and table["seeds_needed"]["clone"] > 3  # mean -1.33
    assert decided(*failing("p7b2/clone/0"))["seeds_needed"].isna()["clone"]  # mean -0.33


def test_an_arm_without_a_finished_trial_is_no_go_and_counts_for_holm() -> None:
    study = trials(p7b1__noise_acting=[0.0] * 4, p7b1__a=DOUBTFUL)
    assert decided(study)["verdict"]["a"] == "GO"
    failures = pd.DataFrame({"phase": "p7b1", "arm": arm, "seed": seed} for arm in "bcd" for seed in range(4))
    table = decided(study, failures)
    assert [table["verdict"][arm] for arm in ("a", "b", "noise_acting")] == ["INCONCLUSIVE", "NO-GO", "GO"]
    assert table["p_holm"]["a"] == pytest.approx(4 * table["p_value"]["a"])
    numbers = ["accuracy", "accuracy_lo", "delta_pp", "delta_hi", "delta_sd", "p_value", "p_holm", "seeds_needed"]
    assert table.loc["b", [*numbers, *AVERAGED]].isna().all()
    assert list(table.loc["b", ["n_seeds", "n_failed"]]) == [0, 4]
    assert decided(*failing(*(f"p7b2/split/{seed}" for seed in range(4))))["verdict"]["split"] == "NO-GO"


def test_a_seed_that_its_start_or_the_control_failed_counts_against_no_arm() -> None:
    start = decided(*failing(*(f"{name}/2" for name in NAMES)))
    assert start["n_failed"].to_dict() == dict.fromkeys(start.index, 0) | {"baseline": 1, "continue": 1}
    assert set(start["n_seeds"]) == {3} and start["verdict"]["split"] == "GO"
    control = decided(*failing("p7a/continue/2"))
    assert control["n_failed"].to_dict() == dict.fromkeys(control.index, 0) | {"continue": 1}
    numbers = ["verdict", "n_seeds", "accuracy", "delta_pp", "delta_lo", "delta_hi", "p_value"]
    pd.testing.assert_frame_equal(control[numbers], start[numbers])


def test_a_trial_either_finished_or_failed_and_some_of_the_control_finished() -> None:
    tried, failures = failing("p7b2/split/3", "p7b2/split/1")
    with pytest.raises(UserError, match="phase p7b2, arm split has no trial for seed 1"):
        decided(tried, failures[failures["seed"] == 3])
    with pytest.raises(UserError, match="phase p7b2, arm split, seed 1 is in the table twice"):
        decided(STUDY, failures)
    with pytest.raises(UserError, match=r"every trial of the control failed \(phase p7a, arm continue\)"):
        decided(*failing(*(f"p7a/continue/{seed}" for seed in range(4))))


def test_the_headline_is_the_same_from_a_file_in_plain_values(tmp_path: Path) -> None:
    table = decided(*failing(*(f"p7b2/split/{seed}" for seed in range(4)), "p7b2/clone/1"))
    write_table(tmp_path / "decisions.csv", table)
    for row in decision_rows(table):
        made, read = (metrics(t, row.phase, row.arm) for t in (table, read_table(tmp_path / "decisions.csv")))
        assert read == {name: float(f"{x:.10g}") if isinstance(x, float) else x for name, x in made.items()}
        for name, value in read.items():
            assert type(value) is (int if name == "seeds_needed" else Decision.__annotations__[name])
    failed = {"phase": "p7b2", "arm": "split", "primary": True, "n_seeds": 0, "n_failed": 4, "verdict": "NO-GO"}
    assert metrics(table, "p7b2", "primary") == failed


def test_the_headline_is_of_the_primary_arm_or_of_the_arm_named() -> None:
    table = decided()
    assert [metrics(table, "p7a", arm)["verdict"] for arm in ("primary", "continue")] == ["BASELINE", "CONTROL"]
    assert metrics(table, "p7b1", "primary") == metrics(table, "p7b1", "noise_acting")
    headline = metrics(table, "p7b1", "noise")
    assert (headline["arm"], headline["primary"], headline["verdict"]) == ("noise", False, "GO")
    assert headline["p_holm"] == headline["p_value"]
    with pytest.raises(UserError, match=r"0 rows for phase p7b9, arm primary: they have p7a/baseline, .*p7b2/clone$"):
        metrics(table, "p7b9", "primary")
    with pytest.raises(UserError, match="0 rows for phase p7b2, arm noise: they have"):
        metrics(table, "p7b2", "noise")


def searched(accuracy: Mapping[str, float], *failed: str, seeds: int = 2) -> pd.DataFrame:
    """The trials of a search, each seed one percent better than the last; of `failed` ones (`a, seed 0`) the reason."""
    keys = [(name, seed, value + seed) for name, value in accuracy.items() for seed in range(seeds)]
    table = pd.DataFrame(keys, columns=["candidate", "seed", "accuracy"]).assign(settings="lr=1", **SIZES)
    trial = table["candidate"] + ", seed " + table["seed"].astype(str)
    table["failure"] = ("q1, " + trial + ", step 3: the loss is nan").where(trial.isin(failed))
    table[["accuracy", *COSTS]] = table[["accuracy", *COSTS]].mask(trial.isin(failed))
    return table


def test_candidates_rank_by_the_race_then_by_accuracy_cost_and_name() -> None:
    table = pd.concat([searched(CANDIDATES), searched({"y": 50}, seeds=3)]).assign(
        flops_per_example=[9, 9, 8, 8, 8, 8, *[1] * 5]
    )
    assert [name for name, _ in ranked(table)] == ["y", "a", "b", "c", "z"]
    references = table[table["candidate"] == "z"].replace({"candidate": {"z": "mlp"}})
    tested = pd.DataFrame({"phase": "references", "arm": "mlp", "seed": [0, 1], "accuracy": [64.0, 66.0]})
    board = leaderboard(table, "c", "z", 0.95, reference_rows(references, tested, {"mlp": 68.0}, 0.95))
    assert board["candidate"].tolist() == ["z", "c", "y", "a", "b", "mlp"]
    assert board["chosen"].tolist() == [False, True] + [False] * 4
    assert board["winner"].tolist() == [True] + [False] * 5
    assert board.iloc[-1][["kind", "test_accuracy", "published_accuracy"]].tolist() == ["reference", 65.0, 68.0]
    for names in (("nobody", "a"), ("a", "nobody")):
        with pytest.raises(UserError, match="chosen candidate nobody"):
            leaderboard(table, *names, 0.95)


def test_a_candidate_with_a_failed_trial_has_no_rank() -> None:
    table = searched(CANDIDATES, "a, seed 0", "z, seed 0", "z, seed 1")
    references = reference_rows(table[table["candidate"] == "a"], STUDY, {}, 0.95)
    board = leaderboard(table, "b", "b", 0.95, references).set_index("candidate")
    assert list(board.index) == ["b", "c", "a", "z", "a"] and board["rank"].tolist()[:2] == [1, 2]
    assert board["rank"].isna().tolist() == [False, False, True, True, True]
    assert board["n_seeds"].tolist() == [2, 2, 1, 0, 1] and board["n_failed"].tolist() == [0, 0, 1, 2, 1]
    assert board["accuracy"].tolist()[2] == 71 and board.loc["z", ["accuracy", "accuracy_lo", *COSTS]].isna().all()
