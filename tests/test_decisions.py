"""Verdicts follow from the trials, the margin and the primary arm, and from nothing else."""

from math import inf, isfinite

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasegate import decisions
from phasegate.decisions import AVERAGED, COLUMNS, COSTS, decide, leaderboard, metrics, relabel_control, winner
from phasegate.errors import UserError
from phasegate.statistics import holm, margin_p_value

PRIMARY = {"p7b1": "noise_acting", "p7b2": "split"}
CONTROL = np.array([67.0, 66.4, 67.9, 68.2])


def trials(**deltas: list[float]) -> pd.DataFrame:
    """Trials whose arms (`phase__arm`) differ from the control by the deltas given, seed by seed."""
    arms = {"continue__continue": [0.0] * 4, "p7a__baseline": [-1.0, -1.2, -0.8, -1.1], **deltas}
    return pd.DataFrame(
        {"phase": phase, "arm": arm, "seed": seed, "accuracy": CONTROL[seed] + delta, "n_routed_start": 12}
        | {"n_routed_end": 14, "params_total": 9000, "params_active": 2000}
        | {"flops_per_example": 4000, "train_seconds": 2.5}
        for (phase, arm), values in ((key.split("__"), values) for key, values in arms.items())
        for seed, delta in enumerate(values)
    )


STUDY = trials(
    p7b1__noise=[-0.2, 0.1, 0.0, -0.1],
    p7b1__noise_acting=[-5.0, -6.0, -5.5, -4.9],
    p7b2__split=[0.1, 0.3, -0.1, 0.2],
    p7b2__clone=[-2.5, 0.5, -1.5, 0.0],
)


def verdicts(table: pd.DataFrame) -> dict[str, str]:
    return dict(zip(table["arm"], table["verdict"], strict=True))


def test_a_study_is_decided_primary_arms_first_under_the_contract_columns() -> None:
    table = decide(STUDY, 1.0, 0.95, PRIMARY)
    assert list(table.columns) == COLUMNS
    assert verdicts(table) == {
        **{"baseline": "BASELINE", "continue": "CONTROL", "noise_acting": "NO-GO", "noise": "GO"},
        **{"split": "GO", "clone": "INCONCLUSIVE"},
    }
    assert list(table["arm"]) == ["baseline", "continue", "noise_acting", "noise", "split", "clone"]
    assert table["seeds_needed"].notna().tolist() == [False] * 5 + [True]


def test_the_phase_of_ones_own_comes_after_those_of_the_study() -> None:
    table = decide(
        trials(surgery__split=[0.0] * 4, own__mine=[0.0] * 4), 1.0, 0.95, {"surgery": "split", "own": "mine"}
    )
    assert table["phase"].tolist() == ["p7a", "p7a", "surgery", "own"]


def test_an_exploratory_arm_also_has_to_pass_holm() -> None:
    doubtful = [-0.55, 0.35, -0.3, 0.35]  # p = 0.025 against the margin: a GO alone, not as one of four
    alone = trials(p7b1__noise_acting=doubtful)
    among = trials(p7b1__noise_acting=[0.0] * 4, **{f"p7b1__{name}": doubtful for name in "abcd"})
    assert verdicts(decide(alone, 1.0, 0.95, PRIMARY))["noise_acting"] == "GO"
    assert verdicts(decide(among, 1.0, 0.95, PRIMARY))["a"] == "INCONCLUSIVE"


def test_another_phase_changes_nothing_in_this_one() -> None:
    alone = trials(p7b2__split=[0.1, 0.3, -0.1, 0.2], p7b2__clone=[-2.5, 0.5, -1.5, 0.0])
    one, other = (decide(study, 1.0, 0.95, PRIMARY).query("phase == 'p7b2'") for study in (alone, STUDY))
    pd.testing.assert_frame_equal(one.reset_index(drop=True), other.reset_index(drop=True), check_exact=True)
    assert one["seeds_needed"].notna().any()


@given(st.lists(st.lists(st.integers(-40, 20), min_size=4, max_size=4), min_size=2, max_size=4))
def test_an_undecided_arm_always_needs_more_seeds_than_it_has(arms: list[list[int]]) -> None:
    deltas = {f"p7b2__{'split' if i == 0 else i}": [x / 10 for x in arm] for i, arm in enumerate(arms)}
    table = decide(trials(**deltas), 1.0, 0.95, PRIMARY)
    needed = table[table["seeds_needed"].notna()]
    assert (needed["seeds_needed"] > needed["n_seeds"]).all()
    assert (needed["verdict"] == "INCONCLUSIVE").all()


@given(st.floats(0, 5), st.floats(0, 5))
def test_a_wider_margin_never_turns_a_primary_go_back(small: float, more: float) -> None:
    strict, lax = (verdicts(decide(STUDY, margin, 0.95, PRIMARY))["split"] for margin in (small, small + more))
    assert strict != "GO" or lax == "GO"


def test_relabelled_trials_decide_the_same_and_references_decide_nothing() -> None:
    extra = STUDY[STUDY["arm"] == "split"].assign(phase="references", arm="mlp", n_routed_start=np.nan)
    expected = decide(STUDY, 1.0, 0.95, PRIMARY)
    pd.testing.assert_frame_equal(decide(relabel_control(pd.concat([extra, STUDY])), 1.0, 0.95, PRIMARY), expected)


def test_one_seed_decides_nothing_and_its_headline_has_no_infinite_numbers() -> None:
    table = decide(STUDY[STUDY["seed"] == 0], 1.0, 0.95, PRIMARY)
    assert set(verdicts(table).values()) == {"BASELINE", "CONTROL", "INCONCLUSIVE"}
    assert table["delta_lo"].eq(-inf).all()
    headline = metrics(table, "p7b1")
    assert headline["arm"] == "noise_acting" and headline["delta_pp"] == pytest.approx(-5)
    assert "delta_lo" not in headline and "seeds_needed" not in headline
    assert all(type(value) in (str, bool, int, float) for value in headline.values())


@pytest.mark.parametrize(
    ("delta", "primary", "exploratory"),
    [(0.0, "GO", "GO"), (-1.0, "GO", "INCONCLUSIVE"), (-1.1, "NO-GO", "NO-GO")],
)
def test_equal_differences_have_a_verdict_and_no_nan(delta: float, primary: str, exploratory: str) -> None:
    table = decide(trials(p7b2__split=[delta] * 4, p7b2__clone=[delta] * 4), 1.0, 0.95, PRIMARY)
    for arm, verdict in {"split": primary, "clone": exploratory}.items():
        headline = metrics(table, "p7b2", arm)
        assert headline["verdict"] == verdict and "seeds_needed" not in headline
        assert [headline[bound] for bound in ("delta_lo", "delta_pp", "delta_hi")] == [delta] * 3
        assert all(isfinite(value) for value in headline.values() if not isinstance(value, str))


@pytest.mark.parametrize("seeds", [5, 20])
def test_a_difference_of_exactly_the_margin_is_rarely_a_go_or_a_no_go(
    seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decisions, "seeds_needed", lambda *_, **__: None)  # slow, and not asked for here
    deltas = np.random.default_rng(seeds).normal(-1, 0.8, size=(600, seeds))
    study, seed = map(np.ravel, np.indices(deltas.shape))
    tried = pd.DataFrame({"phase": study, "seed": seed, "accuracy": 70 + deltas.ravel()}).assign(arm="split")
    control = pd.DataFrame({"phase": "continue", "seed": range(seeds), "accuracy": 70.0}).assign(arm="continue")
    studies = pd.concat([tried, control]).astype({"phase": str}).assign(**dict.fromkeys(AVERAGED, 1))
    table = decide(studies, 1.0, 0.95, {str(phase): "split" for phase in range(600)})
    rates = table[table["primary"]]["verdict"].value_counts(normalize=True)
    assert abs(rates["GO"] - 0.025) < 0.02 and abs(rates["NO-GO"] - 0.025) < 0.02


def test_the_seeds_an_exploratory_arm_needs_decide_it_four_times_in_five_whatever_becomes_of_the_others() -> None:
    arms = {f"p7b2__{arm}": [0.0] * 4 for arm in ("split", "reinit", "split_thresholds")}
    pilot = decide(trials(**arms, p7b2__clone=[-1.5, 0.5, -1.7, 0.7]), 1.0, 0.95, PRIMARY)
    clone = pilot[pilot["arm"] == "clone"].to_dict("records")[0]
    studies = np.random.default_rng(0).normal(clone["delta_pp"], clone["delta_sd"], size=(4000, clone["seeds_needed"]))
    ps = [margin_p_value(study, 1.0) for study in studies]
    worst, easy = (np.mean([holm([p, other, other])[0] < 0.05 for p in ps]) for other in (1, 0))
    assert abs(worst - 0.8) < 0.015 and easy > 0.85


def test_a_missing_seed_is_named_on_either_side_and_so_is_a_number_that_is_none() -> None:
    lacking = (STUDY["arm"] == "split") & (STUDY["seed"] == 3)
    with pytest.raises(UserError, match="phase p7b2, arm split has no trial for seed 3"):
        decide(STUDY[~lacking], 1.0, 0.95, PRIMARY)
    with pytest.raises(UserError, match=r"arm continue .*no trial for seed 2"):
        decide(STUDY[~((STUDY["arm"] == "continue") & (STUDY["seed"] == 2))], 1.0, 0.95, PRIMARY)
    with pytest.raises(UserError, match="accuracy of phase p7b2, arm split, seed 3 is nan"):
        decide(STUDY.assign(accuracy=STUDY["accuracy"].mask(lacking)), 1.0, 0.95, PRIMARY)
    control = STUDY["arm"] == "continue"
    with pytest.raises(UserError, match="accuracy of phase p7a, arm continue, seed 0 is inf"):
        decide(STUDY.assign(accuracy=STUDY["accuracy"].mask(control, inf)), 1.0, 0.95, PRIMARY)
    with pytest.raises(UserError, match="no control arm: phase continue, arm continue"):
        decide(STUDY[~control], 1.0, 0.95, PRIMARY)
    with pytest.raises(UserError, match="twice"):
        decide(pd.concat([STUDY, STUDY.tail(1)]), 1.0, 0.95, PRIMARY)
    with pytest.raises(UserError, match="primary arm of phase p7b2"):
        decide(STUDY, 1.0, 0.95, PRIMARY | {"p7b2": "merge"})


def failing(*names: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The study with some trials failed, `phase/arm/seed`: those that finished, and the failures."""
    given = STUDY["phase"] + "/" + STUDY["arm"] + "/" + STUDY["seed"].astype(str)
    assert set(names) <= set(given)
    failed = given.isin(names)
    return STUDY[~failed], STUDY[failed][["phase", "arm", "seed"]].assign(step=7, reason="the loss is nan")


def decided(*names: str) -> pd.DataFrame:
    """The decisions of the study with some trials failed, by arm."""
    tried, failures = failing(*names)
    return decide(tried, 1.0, 0.95, PRIMARY, failures).set_index("arm")


NUMBERS = ["accuracy", "accuracy_lo", "delta_pp", "delta_hi", "delta_sd", "p_value", "seeds_needed", *AVERAGED]


def test_an_arm_with_a_failed_trial_is_never_go_and_compares_the_seeds_that_are_left() -> None:
    table, finished = decided("p7b2/split/3", "p7b1/noise/0"), decide(STUDY, 1.0, 0.95, PRIMARY).set_index("arm")
    for arm in ("split", "noise"):
        assert finished["verdict"][arm] == "GO" and table["verdict"][arm] == "INCONCLUSIVE"
        assert table["delta_lo"][arm] >= -1 and table["seeds_needed"].isna()[arm]  # no seeds would mend it
    assert list(table.loc["split", ["n_seeds", "n_failed"]]) == [3, 1]
    assert table["delta_pp"]["split"] == pytest.approx(0.1)
    others = ["baseline", "continue", "noise_acting", "clone"]
    pd.testing.assert_frame_equal(table.loc[others].drop(columns="p_holm"), finished.loc[others].drop(columns="p_holm"))


def test_what_is_left_of_an_arm_can_still_be_a_no_go_or_need_seeds_to_become_one() -> None:
    table = decided("p7b1/noise_acting/1", "p7b2/clone/1")
    assert table["verdict"]["noise_acting"] == "NO-GO" and table["n_failed"]["noise_acting"] == 1
    assert table["verdict"]["clone"] == "INCONCLUSIVE" and table["seeds_needed"]["clone"] > 3  # mean -1.33
    assert decided("p7b2/clone/0")["seeds_needed"].isna()["clone"]  # mean -0.33


def test_an_arm_without_a_finished_trial_is_no_go_without_numbers_and_counts_for_holm() -> None:
    doubtful = [-0.55, 0.35, -0.3, 0.35]  # p = 0.025 against the margin: a GO alone, not as one of four
    study = trials(p7b1__noise_acting=[0.0] * 4, p7b1__a=doubtful)
    assert verdicts(decide(study, 1.0, 0.95, PRIMARY))["a"] == "GO"
    failures = pd.DataFrame({"phase": "p7b1", "arm": arm, "seed": seed} for arm in "bcd" for seed in range(4))
    table = decide(study, 1.0, 0.95, PRIMARY, failures).set_index("arm")
    assert table["verdict"].to_dict() | {"a": "INCONCLUSIVE", "b": "NO-GO", "noise_acting": "GO"} == (
        table["verdict"].to_dict()
    )
    assert table["p_holm"]["a"] == pytest.approx(4 * table["p_value"]["a"])
    assert table.loc["b", [*NUMBERS, "p_holm"]].isna().all()
    assert list(table.loc["b", ["n_seeds", "n_failed"]]) == [0, 4]
    assert decided(*(f"p7b2/split/{seed}" for seed in range(4)))["verdict"]["split"] == "NO-GO"


def test_a_seed_that_its_start_or_the_control_failed_counts_against_no_arm() -> None:
    start = decided(*(f"{phase}/{arm}/2" for phase, arm in STUDY[["phase", "arm"]].drop_duplicates().to_numpy()))
    assert start["n_failed"].to_dict() == dict.fromkeys(start.index, 0) | {"baseline": 1, "continue": 1}
    assert set(start["n_seeds"]) == {3} and start["verdict"]["split"] == "GO"
    control = decided("continue/continue/2")
    assert control["n_failed"].to_dict() == dict.fromkeys(control.index, 0) | {"continue": 1}
    numbers = ["verdict", "n_seeds", "accuracy", "delta_pp", "delta_lo", "delta_hi", "p_value"]
    pd.testing.assert_frame_equal(control[numbers], start[numbers])


def test_a_trial_is_either_finished_or_failed_and_a_control_that_never_finished_is_refused() -> None:
    tried, failures = failing("p7b2/split/3", "p7b2/split/1")
    with pytest.raises(UserError, match="phase p7b2, arm split has no trial for seed 1, the control has"):
        decide(tried, 1.0, 0.95, PRIMARY, failures[failures["seed"] == 3])
    with pytest.raises(UserError, match="phase p7b2, arm split, seed 1 is in the table twice"):
        decide(STUDY, 1.0, 0.95, PRIMARY, failures)
    with pytest.raises(UserError, match="every trial of the control failed: phase continue, arm continue"):
        decided(*(f"continue/continue/{seed}" for seed in range(4)))


def test_the_headline_of_an_arm_without_a_finished_trial_has_its_verdict_and_counts_alone() -> None:
    table = decided(*(f"p7b2/split/{seed}" for seed in range(4))).reset_index()
    assert metrics(table[COLUMNS], "p7b2") == {
        **{"phase": "p7b2", "arm": "split", "primary": True, "verdict": "NO-GO"},
        **{"n_seeds": 0, "n_failed": 4},
    }
    assert type(metrics(table[COLUMNS], "p7b2")["n_failed"]) is int


def test_the_headline_is_of_the_primary_arm_or_of_the_one_named() -> None:
    table = decide(STUDY, 1.0, 0.95, PRIMARY)
    assert metrics(table, "p7a")["verdict"] == "BASELINE"
    assert metrics(table, "p7a", "continue")["verdict"] == "CONTROL"
    assert metrics(table, "p7b1") == metrics(table, "p7b1", "primary") == metrics(table, "p7b1", "noise_acting")
    headline = metrics(table, "p7b1", "noise")
    assert (headline["arm"], headline["primary"], headline["verdict"]) == ("noise", False, "GO")
    assert headline["p_holm"] == headline["p_value"]


def test_the_headline_refuses_unknown_phases_and_arms_and_silent_nan() -> None:
    table = decide(STUDY, 1.0, 0.95, PRIMARY)
    with pytest.raises(UserError, match=r"0 rows for phase p7b9, arm primary: they have p7a/baseline, .*p7b2/clone$"):
        metrics(table, "p7b9")
    with pytest.raises(UserError, match="0 rows for phase p7b2, arm noise: they have"):
        metrics(table, "p7b2", "noise")
    with pytest.raises(UserError, match="train_seconds"):
        metrics(table.assign(train_seconds=np.nan), "p7b1")


def searched(*failed: tuple[str, int]) -> pd.DataFrame:
    """Two seeds of four candidates, the best of them a, b and c; of some trials only the failure."""
    table = pd.DataFrame(
        {"candidate": name, "seed": seed, "accuracy": accuracy + seed, "flops_per_example": flops}
        | {"params_total": 1, "params_active": 1, "train_seconds": 1.0, "settings": "lr=1", "failure": np.nan}
        for name, accuracy, flops in (("c", 70, 9), ("b", 70, 8), ("a", 70, 8), ("z", 60, 1))
        for seed in (0, 1)
    ).astype({"failure": object})
    for name, seed in failed:
        row = (table["candidate"] == name) & (table["seed"] == seed)
        table.loc[row, ["accuracy", *COSTS]] = np.nan
        table.loc[row, "failure"] = f"q1, {name}, seed {seed}, step 3: the loss is nan"
    return table


def test_the_winner_is_the_most_accurate_then_the_cheapest_then_the_first_by_name() -> None:
    table = searched()
    assert winner(table) == "a"
    references = table[table["candidate"] == "z"].replace({"candidate": {"z": "mlp"}})
    tested = pd.DataFrame({"phase": "references", "arm": "mlp", "seed": [0, 1], "accuracy": [64.0, 66.0]})
    board = leaderboard(table, winner(table), 0.95, references=references, trials=tested, published={"mlp": 68.0})
    assert board["candidate"].tolist() == ["a", "b", "c", "z", "mlp"]
    assert board["chosen"].tolist() == [True, False, False, False, False]
    assert board.iloc[-1][["kind", "test_accuracy", "published_accuracy"]].tolist() == [
        "reference",
        65.0,
        68.0,
    ]
    with pytest.raises(UserError, match="chosen candidate nobody"):
        leaderboard(table, "nobody", 0.95)


def test_a_candidate_with_a_failed_trial_is_never_chosen_and_has_no_rank() -> None:
    table = searched(("a", 0), ("z", 0), ("z", 1))
    assert winner(table) == "b"
    board = leaderboard(table, "b", 0.95, references=table[table["candidate"] == "a"]).set_index("candidate")
    assert list(board.index) == ["b", "c", "a", "z", "a"] and board["rank"].tolist()[:2] == [1, 2]
    assert board["rank"].isna().tolist() == [False, False, True, True, True]
    assert board["n_seeds"].tolist() == [2, 2, 1, 0, 1] and board["n_failed"].tolist() == [0, 0, 1, 2, 1]
    assert board["accuracy"].tolist()[2] == 71 and board.loc["z", ["accuracy", "accuracy_lo", *COSTS]].isna().all()
    assert winner(table[table["candidate"] == "b"]) == "b"
    with pytest.raises(UserError, match=r"every candidate .* the first: q1, a, seed 0, step 3: the loss is nan"):
        winner(table[table["candidate"].isin(["a", "z"])])
