"""An arm's loss is the sum of its parts, and each part is the effect that it is named after."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from phasegate.base.errors import UserError
from phasegate.params import load_params
from phasegate.verdicts.attribution import ACCOUNTS, COLUMNS, CONTINUED, FACTORIAL, WHOLE, attribution
from phasegate.verdicts.decisions import decide
from phasegate.verdicts.statistics import holm
from tests.small_study import ROOT
from tests.test_decisions import NONE, RULE, claims_of, failing, tables_of, trials_of

CONTRASTS = {(name, part): weights for name, account in ACCOUNTS.items() for part, weights in account.items()}
NEEDED = sorted({arm for contrast in CONTRASTS.values() for arm in contrast})
SEEDS = 4
EFFECT = ["effect_pp", "effect_lo", "effect_hi"]
TRIALS = trials_of(dict(zip(NEEDED, np.random.default_rng(0).normal(80, 3, (len(NEEDED), SEEDS)), strict=True)))
TABLE = attribution(TRIALS, NONE, 0.95)


def planted(accuracy: dict[str, float]) -> "pd.Series[float]":
    """The effects of the factorial, by part, where arms have these accuracies beside what a seed adds to all."""
    seeds = np.array([80.1, 81.7, 79.4, 80.6])
    table = attribution(trials_of({arm: accuracy.get(arm, 0.0) + seeds for arm in NEEDED}), NONE, 0.95)
    rows = table.query("account == 'factorial'").set_index("part")
    for bound in EFFECT[1:]:
        assert rows[bound].tolist() == pytest.approx(rows["effect_pp"].tolist(), abs=1e-8)
    return rows["effect_pp"]


@given(arrays(np.float64, (len(NEEDED), SEEDS), elements=st.floats(0, 100)))
@settings(max_examples=20)
def test_the_parts_of_a_chain_add_up_to_its_whole(accuracy: NDArray[np.float64]) -> None:
    table = attribution(trials_of(dict(zip(NEEDED, accuracy, strict=True))), NONE, 0.95)
    for name, rows in table[table["account"] != "factorial"].groupby("account"):
        *parts, whole = rows["effect_pp"]
        assert sum(parts) == pytest.approx(whole, abs=1e-7), name


@pytest.mark.parametrize("key", CONTRASTS, ids=": ".join)
def test_a_contrast_compares_known_arms_and_its_weights_sum_to_zero(key: tuple[str, str]) -> None:
    assert sum(CONTRASTS[key].values()) == pytest.approx(0, abs=1e-12)
    phases = load_params(ROOT / "params.yaml").arms()
    assert set(CONTRASTS[key]) <= {f"{phase}/{arm}" for phase, arms in phases.items() for arm in arms}


@pytest.mark.parametrize(  # entropy adds 2 to each growth, and 6 more to clones or to fresh experts: a third, a half
    ("clones", "fresh", "effects"),
    [(1, -1, [2, -1, -3, 0, 0]), (1 + 6, -1, [4, 2, -3, 6, 0]), (1, -1 + 6, [4, -1, 0, 0, 6])],
)
def test_the_factorial_recovers_planted_effects(clones: int, fresh: int, effects: list[float]) -> None:
    levels = {"random": {"split": 0, "clone": -1, "reinit": -3}}
    levels["entropy"] = {"split": 2, "clone": clones, "reinit": fresh}
    found = planted({arm: levels[signal][growth] for signal in FACTORIAL for growth, arm in FACTORIAL[signal].items()})
    assert found.tolist() == pytest.approx(effects, abs=1e-8)


def test_an_interaction_without_marginal_effects_shows_in_its_own_row_alone() -> None:
    cells = {"split": -1.0, "clone": 2.0, "reinit": -1.0}  # rows and columns of the factorial sum to zero
    signs = {"entropy": 1, "random": -1}
    found = planted({FACTORIAL[signal][name]: signs[signal] * cell for name, cell in cells.items() for signal in signs})
    assert found[found.abs() > 1e-8].to_dict() == {"interaction: entropy and clones": pytest.approx(6)}


def test_the_table_has_every_contrast_in_order_with_corrected_p_values() -> None:
    assert list(TABLE.columns) == COLUMNS
    assert list(zip(TABLE["account"], TABLE["part"], strict=True)) == list(CONTRASTS)
    whole = TABLE["part"] == WHOLE
    assert (TABLE["p_holm"] >= TABLE["p_value"])[~whole].all() and TABLE["p_holm"][whole].isna().all()
    for _, parts in TABLE[~whole].groupby("account"):
        assert parts["p_holm"].tolist() == holm(parts["p_value"]).tolist()


def test_a_part_that_is_an_arm_minus_the_control_is_this_arm_in_the_decisions() -> None:
    parts = TABLE.query("part == 'noise gradient in the trunk'")
    claims = claims_of({"p7b1": "noise", "p7b2": "split"})
    arms = decide(tables_of(TRIALS), claims, RULE).query("arm == 'noise'")
    assert parts[EFFECT].to_numpy().tolist() == arms[["delta_pp", "delta_lo", "delta_hi"]].to_numpy().tolist()


def test_a_contrast_is_over_the_seeds_that_all_its_arms_finished() -> None:
    columns, fewer = ["n_seeds", *EFFECT, "p_value"], attribution(TRIALS[TRIALS["seed"] != 2], NONE, 0.95)
    found = attribution(*failing("p7b2/split_thresholds/2", study=TRIALS), 0.95)
    concerned = found["contrast"].str.contains("p7b2/split_thresholds")
    assert concerned.any() and not concerned.all()
    pd.testing.assert_frame_equal(found[columns], fewer[columns].where(concerned, TABLE[columns]))


def test_a_contrast_that_no_seed_finished_is_blank_and_counts_for_holm() -> None:
    found = attribution(*failing(*(f"p7b1/noise_acting/{seed}" for seed in range(SEEDS)), study=TRIALS), 0.95)
    blank = found["n_seeds"] == 0
    assert found[blank]["part"].tolist() == ["a head deciding, not the labels", WHOLE]
    assert found.loc[blank, [*EFFECT, "p_value", "p_holm"]].isna().all().all()
    worst = TABLE["p_value"].mask(blank, 1)[(found["account"] == "p7b1") & (found["part"] != WHOLE)]
    assert found["p_holm"][worst.index].dropna().tolist() == holm(worst).tolist()[:-1]


@pytest.mark.parametrize("arm", [arm for arm in NEEDED if arm != CONTINUED])
def test_an_arm_that_is_missing_is_named(arm: str) -> None:
    with pytest.raises(UserError, match=f"needs the arm {arm}: it has no trials"):
        attribution(TRIALS[TRIALS["phase"] + "/" + TRIALS["arm"] != arm], NONE, 0.95)
