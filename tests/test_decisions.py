"""Verdicts follow from the trials, the margin and the primary arm, and from nothing else."""

from math import inf, isfinite

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phasegate import decisions
from phasegate.decisions import AVERAGED, COLUMNS, decide, leaderboard, metrics, relabel_control, winner
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


def test_the_winner_is_the_most_accurate_then_the_cheapest_then_the_first_by_name() -> None:
    table = pd.DataFrame(
        {"candidate": name, "seed": seed, "accuracy": accuracy + seed, "flops_per_example": flops}
        | {"params_total": 1, "params_active": 1, "train_seconds": 1.0, "settings": "lr=1"}
        for name, accuracy, flops in (("c", 70, 9), ("b", 70, 8), ("a", 70, 8), ("z", 60, 1))
        for seed in (0, 1)
    )
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
