"""Words and verdicts follow from the trials, the margins, the claims and the surgeries, and from nothing else."""

from collections.abc import Iterable, Mapping
from math import inf, isfinite, isnan, nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phasegate.base.errors import UserError
from phasegate.params import load_params
from phasegate.params.phases import Claim, Decisions
from phasegate.pretraining.ranking import ranked
from phasegate.records.tables import COSTS, read_table, write_table
from phasegate.records.trial_folder import FAILURE_COLUMNS
from phasegate.verdicts.decisions import AVERAGED, Decision, decide, decision_rows, metrics
from phasegate.verdicts.leaderboard import leaderboard, reference_rows
from tests.small_study import ROOT

PRIMARY = {"p7b1": "noise_acting", "p7b2": "split"}
CONTROL = np.array([67.0, 66.4, 67.9, 68.2])
DOUBTFUL = [0.45, 1.35, 0.7, 1.35]  # p = 0.025: BETTER alone, not as one of four
KEYS = ["phase", "arm", "seed"]
CANDIDATES = {"c": 70, "b": 70, "a": 70, "z": 60}
SIZES = dict(zip(AVERAGED, (60, 12, 14, 9000, 2000, 4000), strict=True))
RULE = load_params(ROOT / "params.yaml").decisions.model_copy(update={"confidence": 0.95})


def trials_of(arms: Mapping[str, Iterable[float]]) -> pd.DataFrame:
    """Trials of arms, `phase/arm`, with these accuracies seed by seed, and an NLL that is the seed's in every arm."""
    trials = [(*key.split("/"), seed, value) for key, values in arms.items() for seed, value in enumerate(values)]
    table = pd.DataFrame(trials, columns=[*KEYS, "accuracy"]).assign(**SIZES)
    return table.assign(nll=0.5 + 0.01 * table["seed"])


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
NO_SHARE = pd.DataFrame(columns=["phase", "arm", "accuracy_se"])  # of the test examples


def tables_of(study: pd.DataFrame, failures: pd.DataFrame = NONE, idle: Iterable[str] = ()) -> dict[str, pd.DataFrame]:
    """What `decide` takes: trials with two operations each but in the arms `idle`, and no error of sampling."""
    operated = study[~study["arm"].isin(["continue", "baseline", *idle])][KEYS]
    sampling = study[["phase", "arm"]].drop_duplicates().assign(accuracy_se=0.0, delta_se=nan)
    return {"trials": study, "failures": failures, "surgeries": pd.concat([operated] * 2), "sampling": sampling}


def claims_of(primary: Mapping[str, str], claim: str = "harmless", **assay: Any) -> dict[str, Claim]:
    """A claim for each phase; its assay is that the control beats the checkpoints it comes from."""
    assay = {"better": "p7a/continue", "worse": "p7a/baseline", "margin_pp": 0} | assay
    stated = {"claim": claim, "hypothesis": "It is so.", "expected": "GO", "assay": assay}
    values = {phase: {"arms": [arm], "primary": arm} | stated for phase, arm in primary.items()}
    return {phase: Claim.model_validate(value) for phase, value in values.items()}


def rule_of(pp: float, control: Iterable[float] = CONTROL) -> Decisions:
    """The rule under which the margin, and the smallest gain, are this many pp beside this control."""
    share = pp / (100 - np.mean(list(control)))
    return RULE.model_copy(update={"margin": share, "gain": share})


def decided(
    study: pd.DataFrame = STUDY, failures: pd.DataFrame = NONE, margin: float = 1.0, idle: Iterable[str] = (),
    claim: str = "harmless", **assay: Any,
) -> pd.DataFrame:  # fmt: skip
    """The decisions by arm."""
    claims = claims_of(PRIMARY, claim, **assay)
    return decide(tables_of(study, failures, idle), claims, rule_of(margin)).set_index("arm", drop=False)


def failing(*names: str, study: pd.DataFrame = STUDY) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The study with some trials failed, `phase/arm/seed`: the trials that finished, and the failures."""
    failed = (study["phase"] + "/" + study["arm"] + "/" + study["seed"].astype(str)).isin(names)
    assert failed.sum() == len(names)
    return study[~failed], study[failed][KEYS].assign(step=7, reason="the loss is nan")


def test_a_study_is_decided_primary_arms_first_and_plugins_last() -> None:
    table = decided()
    assert list(table.columns) == list(Decision._fields)
    verdicts = {"baseline": "BASELINE", "continue": "CONTROL", "noise_acting": "NO-GO", "noise": "", "split": "GO"}
    assert table["verdict"].to_dict() == verdicts | {"clone": ""}
    words = {"noise_acting": "WORSE", "noise": "EQUIVALENT", "split": "EQUIVALENT", "clone": "UNDECIDED"}
    assert table["word"].to_dict() == {"baseline": "", "continue": ""} | words
    assert table["as_expected"].to_dict() == dict.fromkeys(table.index, "") | {"noise_acting": "no", "split": "yes"}
    study = trials(surgery__split=[0.0] * 4, plugins__mine=[0.0] * 4, p7b1__noise=[0.0] * 4)
    table = decide(tables_of(study), claims_of({"p7b1": "noise", "surgery": "split", "plugins": "mine"}), RULE)
    assert table["phase"].tolist() == ["p7a", "p7a", "p7b1", "surgery", "plugins"]


def test_margins_are_shares_of_the_error_and_of_the_nll_of_the_control() -> None:
    study = trials(p7b2__split=[-0.1] * 4)
    table = decide(tables_of(study), claims_of(PRIMARY), RULE.model_copy(update={"margin": 0.02, "gain": 0.04}))
    assert table["margin_pp"].tolist() == [pytest.approx(0.02 * 32.625)] * 3
    assert table["gain_pp"].tolist() == [pytest.approx(0.04 * 32.625)] * 3
    assert table["margin_nll"].tolist() == [pytest.approx(0.02 * 0.515)] * 3


def controlled() -> tuple[pd.DataFrame, dict[str, Claim]]:
    """A study whose phases have controls of their own, and its claims."""
    arms: dict[str, Iterable[float]] = {"p7a/continue": CONTROL, "p7a/baseline": CONTROL - 1}
    arms |= {"p7b2/split": CONTROL + 0.1, "p7c3/leave": [50.0, 51, 49, 50], "p7c3/oracle": [51.0, 52, 50, 51]}
    study = trials_of(arms | {"p7c3/yoked": [50.5, 51.5, 49.5, 50], "p7c3/sham": CONTROL - DOUBTFUL})
    claims = claims_of({"p7b2": "split", "p7c3": "oracle"}, "gain")
    own = {"control": "p7c3/leave", "arms": ("leave", "oracle", "yoked", "sham"), "controls": {"sham": "p7a/continue"}}
    return study, claims | {"p7c3": claims["p7c3"].model_copy(update=own)}


def test_each_arm_is_compared_with_the_control_of_its_claim() -> None:
    study, claims = controlled()
    table = decide(tables_of(study), claims, RULE).set_index("arm", drop=False)
    assert table["phase"].tolist() == ["p7a"] * 2 + ["p7b2"] + ["p7c3"] * 4
    assert table["control"].tolist() == ["p7a/continue"] * 3 + ["p7c3/leave"] * 3 + ["p7a/continue"]
    assert table["delta_pp"].tolist() == pytest.approx([-1, 0, 0.1, 1, 0, 0.375, -0.9625])
    margins = [0.02 * (50 if control == "p7c3/leave" else 32.625) for control in table["control"]]
    assert table["margin_pp"].tolist() == table["gain_pp"].tolist() == pytest.approx(margins)
    leave = table.loc["leave"]
    assert (leave["verdict"], leave["word"]) == ("CONTROL", "") and np.isnan(leave["p_value"])
    assert table["p_holm"]["sham"] == min(1, 2 * table["p_value"]["sham"])  # of two: the control is no trial
    assert (table["verdict"]["oracle"], table["verdict"]["continue"]) == ("GO", "CONTROL")


def test_a_control_that_failed_or_is_not_there_is_named() -> None:
    study = trials(p7b2__split=[0.1] * 4, p7c1__small=[0.0] * 4, p7c1__birth=[1.0] * 4)
    claims = claims_of({"p7b2": "split", "p7c1": "birth"})
    for control, failed, sentence in (
        ("p7c1/smal", 0, "the trials have no control arm: phase p7c1, arm smal"),
        ("p7c1/small", 4, r"every trial of the control failed \(phase p7c1, arm small\)"),
        ("p7c1/small", 1, ""),
    ):
        claims["p7c1"] = claims["p7c1"].model_copy(update={"control": control})
        kept, failures = failing(*(f"p7c1/small/{seed}" for seed in range(failed)), study=study)
        if sentence:
            with pytest.raises(UserError, match=sentence):
                decide(tables_of(kept, failures), claims, RULE)
        else:  # counts against no arm but itself
            table = decide(tables_of(kept, failures), claims, RULE).set_index("arm")
            assert table.loc[["small", "birth"], ["n_seeds", "n_failed"]].to_numpy().tolist() == [[3, 1], [3, 0]]


def test_the_better_and_worse_of_an_exploratory_arm_also_have_to_pass_holm() -> None:
    among = trials(p7b1__noise_acting=[0.0] * 4, **{f"p7b1__{name}": DOUBTFUL for name in "abcd"})
    assert decided(trials(p7b1__noise_acting=DOUBTFUL))["word"]["noise_acting"] == "BETTER"
    assert decided(among)["word"]["a"] == "NO WORSE"
    lost = trials(p7b1__noise_acting=[0.0] * 4, **{f"p7b1__{name}": [-x for x in DOUBTFUL] for name in "abcd"})
    assert decided(lost)["word"]["a"] == "UNDECIDED" and decided(lost)["delta_hi"]["a"] < 0


def test_another_phase_changes_nothing_in_this_one_and_references_nothing_at_all() -> None:
    one, other = (decided(study).query("phase == 'p7b2'") for study in (STUDY[STUDY["phase"] != "p7b1"], STUDY))
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    extra = STUDY[STUDY["arm"] == "split"].assign(phase="references", arm="mlp", n_routed_start=np.nan)
    pd.testing.assert_frame_equal(decided(pd.concat([extra, STUDY]), extra[KEYS]), decided())


@given(st.floats(0, 5), st.floats(0, 5))
@settings(max_examples=20)
def test_a_wider_margin_never_turns_a_primary_go_back(small: float, more: float) -> None:
    strict, lax = (decided(margin=margin)["verdict"]["split"] for margin in (small, small + more))
    assert strict != "GO" or lax == "GO"


def test_one_seed_decides_nothing_and_its_headline_has_no_infinite_numbers() -> None:
    table = decided(STUDY[STUDY["seed"] == 0])
    assert set(table["verdict"]) == {"BASELINE", "CONTROL", "NO ASSAY", ""} and table["delta_lo"].eq(-inf).all()
    assert set(table["word"]) == {"", "UNDECIDED"}
    headline = metrics(table, "p7b1", "primary")
    assert headline["arm"] == "noise_acting" and headline["delta_pp"] == pytest.approx(-5)
    assert "delta_lo" not in headline and "assay_lo" not in headline


@pytest.mark.parametrize(
    ("delta", "verdict", "word"),
    [(0, "GO", "EQUIVALENT"), (-1, "GO", "WORSE"), (-1.1, "NO-GO", "WORSE"), (0.5, "GO", "BETTER")],
)
def test_equal_differences_have_a_verdict_and_no_nan(delta: float, verdict: str, word: str) -> None:
    table = decided(trials(p7b2__split=[delta] * 4, p7b2__clone=[delta] * 4))
    for arm, said in (("split", verdict), ("clone", "")):
        headline = metrics(table, "p7b2", arm)
        assert (headline.get("verdict", ""), headline["word"]) == (said, word)
        assert [headline[bound] for bound in ("delta_lo", "delta_pp", "delta_hi", "worst_delta")] == [delta] * 4
        assert all(isfinite(value) for value in headline.values() if not isinstance(value, str))


def test_a_harmless_arm_is_judged_by_its_nll_too_and_its_word_is_not() -> None:
    study = trials(p7b2__split=[0.1, -0.1, 0.1, -0.1])
    for more, verdict in (([0.001] * 4, "GO"), ([0.1] * 4, "NO-GO"), ([0.0, 0.05, 0.0, 0.05], "INCONCLUSIVE")):
        worse = study.assign(nll=study["nll"].where(study["arm"] != "split", study["nll"] + ([0.0] * 8 + more)))
        row = decided(worse).loc["split"]
        assert (row["verdict"], row["word"]) == (verdict, "EQUIVALENT") and row["nll_lo"] <= np.mean(more)


def test_a_gain_is_a_go_only_if_it_is_certain_and_a_no_go_if_it_is_too_small() -> None:
    for deltas, verdict in (
        ([1.5, 2.0, 2.5, 2.0], "GO"),
        ([-0.2, 0.2, -0.1, 0.1], "NO-GO"),  # no harm, and no gain worth having
        ([-1.0, 3.0, 0.0, 2.0], "INCONCLUSIVE"),
    ):
        assert decided(trials(p7b2__split=deltas), claim="gain")["verdict"]["split"] == verdict


def test_a_phase_whose_known_winner_does_not_win_has_no_verdict() -> None:
    for margin, verdict in ((0.7, "GO"), (0.8, "NO ASSAY")):  # of 1.02 [0.75, 1.30]
        row = decided(margin_pp=margin).loc["split"]
        assert (row["verdict"], row["word"]) == (verdict, "EQUIVALENT")
        assert (row["assay_pp"], row["assay_lo"] > 0.7) == (pytest.approx(1.025), True)
    assert decided(margin_pp=0.8)["as_expected"]["split"] == "open"
    upside_down = decided(better="p7a/baseline", worse="p7a/continue")
    assert set(upside_down.loc[["noise_acting", "split"], "verdict"]) == {"NO ASSAY"}
    never_both = decided(*failing(*(f"p7a/baseline/{seed}" for seed in range(4))))
    assert never_both["verdict"]["split"] == "NO ASSAY" and isnan(never_both["assay_pp"]["split"])
    with pytest.raises(UserError, match="an assay needs the arm p7b9/prune: it has no trials"):
        decided(worse="p7b9/prune")


def test_an_arm_that_did_nothing_has_neither_a_p_value_nor_a_verdict() -> None:
    study = trials(p7b2__split=[0.0] * 4, p7b2__clone=[0.0] * 4, p7b2__a=DOUBTFUL, p7b2__b=DOUBTFUL)
    table = decided(study, idle=["split", "clone", "a"])
    assert table["word"].to_dict() == {
        "baseline": "", "continue": "", "split": "NOTHING DONE", "clone": "NOTHING DONE", "a": "NO WORSE",
        "b": "NO WORSE",
    }  # fmt: skip
    assert table.loc[["split", "clone"], ["p_value", "p_holm"]].isna().all(axis=None)
    assert (table["verdict"]["split"], table["as_expected"]["split"]) == ("INCONCLUSIVE", "open")
    assert table["p_holm"]["a"] == pytest.approx(3 * table["p_value"]["a"])  # the idle arm counts
    assert table["operations"].to_dict() == dict.fromkeys(table.index, 0) | {"b": 2}
    assert decided(study)["word"]["split"] == "EQUIVALENT"  # it operated, and nothing came of it
    other = study.assign(nll=study["nll"] + 1e-6 * (study["arm"] == "split"))
    assert decided(other, idle=["split"])["word"]["split"] == "EQUIVALENT"  # it did something else


def test_the_interval_of_an_accuracy_takes_in_the_test_examples_too() -> None:
    tables = tables_of(STUDY)
    tables["sampling"] = tables["sampling"].assign(accuracy_se=3.0, delta_se=0.25)
    wide, narrow = (decide(found, claims_of(PRIMARY), rule_of(1.0)) for found in (tables, tables_of(STUDY)))
    assert (wide["accuracy_hi"] - wide["accuracy_lo"]).min() > 2 * 3.18 * 3 > 2 * np.ptp(narrow["accuracy_hi"])
    pd.testing.assert_series_equal(wide["delta_lo"], narrow["delta_lo"])
    assert set(wide["delta_test_se"]) == {0.25}


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
    assert (finished["verdict"]["split"], table["verdict"]["split"]) == ("GO", "INCONCLUSIVE")
    for arm in ("split", "noise"):
        assert (finished["word"][arm], table["word"][arm]) == ("EQUIVALENT", "UNDECIDED")
        assert table["delta_lo"][arm] > -1
    assert list(table.loc["split", ["n_seeds", "n_failed"]]) == [3, 1]
    assert table["delta_pp"]["split"] == pytest.approx(0.1)
    others = ["baseline", "continue", "noise_acting", "clone"]
    pd.testing.assert_frame_equal(table.loc[others].drop(columns="p_holm"), finished.loc[others].drop(columns="p_holm"))


def test_what_is_left_of_an_arm_can_be_a_no_go() -> None:
    table = decided(*failing("p7b1/noise_acting/1", "p7b2/clone/1"))
    assert table["verdict"]["noise_acting"] == "NO-GO" and table["n_failed"]["noise_acting"] == 1
    assert table["word"].loc[["noise_acting", "clone"]].tolist() == ["WORSE", "UNDECIDED"]


def test_an_arm_without_a_finished_trial_is_no_go_and_counts_for_holm() -> None:
    study = trials(p7b1__noise_acting=[0.0] * 4, p7b1__a=DOUBTFUL)
    assert decided(study)["word"]["a"] == "BETTER"
    failures = pd.DataFrame({"phase": "p7b1", "arm": arm, "seed": seed} for arm in "bcd" for seed in range(4))
    table = decided(study, failures)
    assert [table["word"][arm] for arm in ("a", "b", "noise_acting")] == ["NO WORSE", "", "EQUIVALENT"]
    assert table["p_holm"]["a"] == pytest.approx(4 * table["p_value"]["a"])
    numbers = ["accuracy", "accuracy_lo", "delta_pp", "delta_hi", "delta_sd", "p_value", "p_holm", "nll_delta"]
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
            assert type(value) is Decision.__annotations__[name]
    failed = {"phase": "p7b2", "arm": "split", "primary": True, "n_seeds": 0, "n_failed": 4, "verdict": "NO-GO"}
    failed |= {"claim": "harmless", "expected": "GO", "as_expected": "open"}
    assert failed.items() <= metrics(table, "p7b2", "primary").items()


def test_the_headline_is_of_the_primary_arm_or_of_the_arm_named() -> None:
    table = decided()
    assert [metrics(table, "p7a", arm)["verdict"] for arm in ("primary", "continue")] == ["BASELINE", "CONTROL"]
    assert metrics(table, "p7b1", "primary") == metrics(table, "p7b1", "noise_acting")
    headline = metrics(table, "p7b1", "noise")
    assert "verdict" not in headline
    assert (headline["arm"], headline["primary"], headline["word"]) == ("noise", False, "EQUIVALENT")
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
    table = pd.concat([searched(CANDIDATES), searched({"y": 50}, seeds=3)])
    table["flops_per_example"] = [9, 9, 8, 8, 8, 8, *[1] * 5]
    assert [name for name, _ in ranked(table)] == ["y", "a", "b", "c", "z"]
    references = table[table["candidate"] == "z"].replace({"candidate": {"z": "mlp"}}).assign(published_accuracy=68.0)
    tested = pd.DataFrame({"phase": "references", "arm": "mlp", "seed": [0, 1], "accuracy": [64.0, 66.0]})
    board = leaderboard(table, "c", "z", 0.95, reference_rows(references, tested, NO_SHARE, 0.95))
    assert board["candidate"].tolist() == ["z", "c", "y", "a", "b", "mlp"]
    assert board["chosen"].tolist() == [False, True] + [False] * 4
    assert board["winner"].tolist() == [True] + [False] * 5
    assert board.iloc[-1][["kind", "test_accuracy", "published_accuracy"]].tolist() == ["reference", 65.0, 68.0]
    for names in (("nobody", "a"), ("a", "nobody")):
        with pytest.raises(UserError, match="chosen candidate nobody"):
            leaderboard(table, *names, 0.95)


def test_a_candidate_with_a_failed_trial_has_no_rank() -> None:
    table = searched(CANDIDATES, "a, seed 0", "z, seed 0", "z, seed 1")
    published = table.assign(published_accuracy=nan)
    references = reference_rows(published[published["candidate"] == "a"], STUDY, NO_SHARE, 0.95)
    board = leaderboard(table, "b", "b", 0.95, references).set_index("candidate")
    assert list(board.index) == ["b", "c", "a", "z", "a"] and board["rank"].tolist()[:2] == [1, 2]
    assert board["rank"].isna().tolist() == [False, False, True, True, True]
    assert board["n_seeds"].tolist() == [2, 2, 1, 0, 1] and board["n_failed"].tolist() == [0, 0, 1, 2, 1]
    assert board["accuracy"].tolist()[2] == 71 and board.loc["z", ["accuracy", "accuracy_lo", *COSTS]].isna().all()
